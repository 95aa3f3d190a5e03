"""A forked child draws other noise than its parent: the difference of their releases would be free of noise."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

from isthmus.privacy.noise import SecretNoise, secret_generator


def in_child(draw: Callable[[], bytes]) -> bytes:
    """What a forked child draws."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, draw())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        drawn = pipe.read()
    os.waitpid(child, 0)
    return drawn


def test_parent_and_children_draw_different_noise() -> None:
    noise = SecretNoise()
    noise.words(3)

    def draw() -> bytes:
        return noise.words(8).tobytes()

    drawn = [in_child(draw), in_child(draw), draw()]
    assert [len(each) for each in drawn] == [64] * 3
    assert len(set(drawn)) == 3


def test_a_grandchild_draws_its_own_noise_too() -> None:
    noise = SecretNoise()

    def draw() -> bytes:
        return noise.words(8).tobytes()

    both = in_child(lambda: in_child(draw) + draw())
    assert len(both) == 128
    assert len({both[:64], both[64:], draw()}) == 3


def test_parent_and_child_round_by_different_draws() -> None:
    generator = secret_generator()

    def draw() -> bytes:
        return torch.randint(2**31, (8,), generator=generator).numpy().tobytes()

    drawn = [in_child(draw), in_child(draw), draw()]
    assert all(drawn)
    assert len(set(drawn)) == 3


def test_a_fork_while_another_thread_draws_does_not_block_the_child() -> None:
    noise = SecretNoise()
    stop = threading.Event()

    def keep_drawing() -> None:
        while not stop.is_set():
            noise.words(200_000)

    thread = threading.Thread(target=keep_drawing)
    thread.start()
    try:
        assert all(len(in_child(lambda: noise.words(8).tobytes())) == 64 for _ in range(5))
    finally:
        stop.set()
        thread.join()
