"""What the trunk keeps: each silo's own, within its share, over restarts; all else that is asked gets a named error."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus import errors
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model

WIDTH, CONTEXT = 32, 64
EXAMPLE = 4 * WIDTH * 5 + 40
"""Bytes of an example of five tokens on the disk, at most."""
Ask = Callable[[Message], Any]


def matrix(rows: int = 5, *, seed: int = 0, width: int = WIDTH, spot: float = 0.5) -> pb.Matrix:
    h_TD = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    h_TD[0, 0] = spot
    return codec.encode(h_TD, "fp32")


def keep(example: int, rows: int = 5) -> pb.Keep:
    return pb.Keep(example=example, hidden=matrix(rows, seed=example % 2**32))


def by_number(*examples: int, step: int = 1, lengths: Sequence[int] = (), train: bool = True) -> pb.Forward:
    return pb.Forward(step=step, lengths=lengths or [5] * len(examples), examples=examples, train=train)


class Trunk:
    """A service on a folder, and a channel of each silo to it."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.service = TrunkService(recipe, RoleDirectory(folder))
        hello = greeting(Checkpoint(recipe.model.path), recipe)
        self.good, self.bad = (LoopbackChannel(self.service, name, greeting=hello).call for name in ("good", "bad"))


Start = Callable[..., Trunk]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), blocks=3, max_position_embeddings=CONTEXT)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Start]:
    """A trunk; always on the same folder."""
    started: list[Trunk] = []

    def trunk(*, kept_bytes: int = 2**20, **sections: Any) -> Trunk:
        recipe = make_recipe(
            model,
            silos=("good", "bad"),
            lora={"freeze_bottom": True},
            trunk={"kept_bytes": kept_bytes},
            **{"boundary": {"release_once": True}, **sections},
        )
        started.append(Trunk(recipe, tmp_path / "trunk"))
        return started[-1]

    yield trunk
    for one in started:
        one.service.stop()


def refused(ask: Ask, request: Message, error: type[errors.IsthmusError], *told: str) -> None:
    with pytest.raises(errors.IsthmusError) as caught:
        ask(request)
    assert type(caught.value) is error
    assert caught.value.remedy
    for words in told:
        assert words in str(caught.value)


def test_a_forward_by_numbers_is_the_forward_of_what_was_kept(start: Start) -> None:
    trunk = start()
    for example, rows in ((2**64 - 1, 3), (0, 7)):
        assert trunk.good(keep(example, rows)) == pb.Kept()
    sent = [keep(0, 7).hidden, keep(2**64 - 1, 3).hidden, keep(0, 7).hidden]
    together = pb.Matrix(codec="fp32", rows=17, width=WIDTH, data=b"".join(one.data for one in sent))
    for train in (False, True):
        plain = trunk.good(pb.Forward(step=1, lengths=[7, 3, 7], hidden=together, train=train))
        kept = trunk.good(by_number(0, 2**64 - 1, 0, step=2, lengths=[7, 3, 7], train=train))
        assert kept == plain
    gradient = matrix(17)
    answers = [trunk.good(pb.Backward(step=step, gradient=gradient, reply=True, keep=0)) for step in (1, 2)]
    assert answers[0] == answers[1]


def test_nobody_names_or_changes_anothers_examples(start: Start) -> None:
    trunk = start()
    trunk.good(keep(7))
    expected = trunk.good(by_number(7, train=False))
    refused(trunk.bad, by_number(7), errors.UnknownExampleError, "bad", "send it again")
    trunk.bad(pb.Keep(example=7, hidden=matrix(seed=99)))
    assert trunk.bad(by_number(7, train=False)) != expected
    assert trunk.good(by_number(7, train=False)) == expected


def test_nobody_pushes_out_anothers_examples(start: Start) -> None:
    trunk = start(kept_bytes=2 * 3 * EXAMPLE)
    trunk.good(keep(1))
    expected = trunk.good(by_number(1, train=False))
    for example in range(20):
        trunk.bad(keep(example))
    refused(trunk.bad, by_number(0), errors.UnknownExampleError)
    trunk.bad(by_number(17, 18, 19))
    assert trunk.good(by_number(1, train=False)) == expected


def test_a_failed_forward_opens_no_step(start: Start) -> None:
    trunk = start()
    refused(trunk.good, by_number(1), errors.UnknownExampleError)
    refused(trunk.good, pb.Backward(step=1, gradient=matrix()), errors.UnknownStepError)
    trunk.good(keep(1))
    trunk.good(by_number(1))
    trunk.good(pb.Backward(step=1, gradient=matrix()))


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        pytest.param(pb.Keep(example=1), errors.FrameError, "an example of 0 tokens", id="nothing"),
        pytest.param(pb.Keep(example=1, hidden=matrix(width=31)), errors.FrameError, "5 × 31", id="width"),
        pytest.param(pb.Keep(example=1, hidden=matrix(spot=float("nan"))), errors.FrameError, "NaN", id="nan"),
        pytest.param(
            pb.Keep(example=1, hidden=codec.encode(torch.ones(5, WIDTH), "bf16")), errors.FrameError, "bf16", id="codec"
        ),
        pytest.param(
            pb.Keep(example=1, hidden=pb.Matrix(codec="fp32", rows=5, width=WIDTH, data=b"few")),
            errors.FrameError,
            "3 bytes",
            id="bytes",
        ),
        pytest.param(keep(1, 5000), errors.FrameSizeError, "trunk.kept_bytes", id="beyond-the-share"),
        pytest.param(by_number(7, 8), errors.UnknownExampleError, "0000000000000008", id="unknown"),
        pytest.param(by_number(7, lengths=[4]), errors.FrameError, "has 5 tokens, the forward says 4", id="length"),
        pytest.param(by_number(7, lengths=[5, 5]), errors.FrameError, "1 examples for 2 sequences", id="number"),
        pytest.param(by_number(*[7] * 4097), errors.FrameError, "4097 sequences", id="too-many"),
        pytest.param(
            pb.Forward(step=1, lengths=[5], examples=[7], hidden=matrix()), errors.FrameError, "beside", id="both"
        ),
        pytest.param(pb.Forward(step=1, lengths=[5]), errors.FrameError, "0 rows for sequences of 5", id="neither"),
        pytest.param(pb.Kept(), errors.ProtocolError, "does not answer Kept", id="answer-as-request"),
    ],
)
def test_refused_by_name_and_nobody_is_disturbed(
    start: Start, wrong: Message, error: type[errors.IsthmusError], told: str
) -> None:
    trunk = start()
    for ask in (trunk.good, trunk.bad):
        ask(keep(7))
    expected = trunk.good(by_number(7, train=False))
    refused(trunk.bad, wrong, error, told)
    for ask in (trunk.good, trunk.bad):
        assert ask(by_number(7, train=False)) == expected
    refused(trunk.bad, by_number(1), errors.UnknownExampleError)


def test_one_beyond_the_context_is_refused_as_ever(start: Start) -> None:
    trunk = start()
    trunk.good(keep(1, CONTEXT + 1))
    refused(trunk.good, by_number(1, lengths=[CONTEXT + 1]), errors.FrameError, "context")


def test_few_numbers_do_not_make_the_trunk_hold_more_than_a_frame(start: Start) -> None:
    trunk = start(wire={"max_frame_bytes": 2000})
    trunk.good(keep(1))
    trunk.good(by_number(*[1] * 3, train=False))
    refused(trunk.good, by_number(*[1] * 4), errors.FrameSizeError, "wire.max_frame_bytes")


def test_before_hello(start: Start) -> None:
    stranger = LoopbackChannel(start().service, "stranger").call
    for request in (keep(1), by_number(1)):
        refused(stranger, request, errors.ProtocolError, "before Hello")


def test_a_recipe_that_keeps_nothing(start: Start) -> None:
    trunk = start(boundary={})
    refused(trunk.good, keep(1), errors.ProtocolError, "keeps no examples", "boundary.release_once")
    refused(trunk.good, by_number(1), errors.UnknownExampleError)


def test_a_restart_keeps_all_and_the_order_of_use(start: Start, tmp_path: Path) -> None:
    trunk = start(kept_bytes=2 * 3 * EXAMPLE)
    for example in (1, 2, 3):
        trunk.good(keep(example))
    expected = trunk.good(by_number(1, 2, 3, train=False))
    trunk.good(by_number(1, train=False))
    again = start(kept_bytes=2 * 3 * EXAMPLE)
    assert again.good(by_number(2, 3, 1, train=False)).hidden.rows == 15
    assert again.good(by_number(1, 2, 3, train=False)) == expected
    assert [path.name for path in (tmp_path / "trunk" / "kept").iterdir()] == ["good"]


def test_a_file_the_disk_has_spoilt_counts_as_lost(start: Start, tmp_path: Path) -> None:
    trunk = start()
    trunk.good(keep(1))
    (tmp_path / "trunk" / "kept" / "good" / f"{1:016x}").write_bytes(b"\xff" * 9)
    refused(trunk.good, by_number(1), errors.UnknownExampleError)
    trunk.good(keep(1))
    trunk.good(by_number(1))


def test_a_full_disk(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = start()
    trunk.good(keep(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(trunk.good, keep(2), errors.DiskFullError, "free some space")
    trunk.good(by_number(1))
    refused(trunk.good, by_number(2, step=2), errors.UnknownExampleError)
    trunk.good(keep(2))
    trunk.good(by_number(1, 2, step=2))
