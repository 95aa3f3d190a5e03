"""Turns that go on with a kept conversation get the tokens of a new session, and only what is new crosses."""

from __future__ import annotations

import time
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.gateway.generation import GenerationRequest
from isthmus.wire import isthmus_pb2 as pb
from tests.integration.gateways import DP
from tests.oracle.conftest import BuildTwins
from tests.oracle.gateway import Collected, batching, written
from tests.oracle.test_bottleneck import SECTIONS
from tests.oracle.test_drafts import draft_for
from tests.oracle.test_gateway import PROMPTS, alone, greedy, random_prompt
from tests.oracle.test_generation import crossed
from tests.oracle.test_ropes import CASES, Build, built  # noqa: F401
from tests.oracle.twins import Twins

LENGTH = 10
TURN = st.tuples(st.integers(1, 12), st.integers(0, 15), st.integers(0, 2**16))


@pytest.fixture
def llama(twins_of: BuildTwins) -> Twins:
    return twins_of("llama", (2, 1))


def shared(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@given(turns=st.lists(TURN, min_size=1, max_size=5), drafting=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_turns_continued_and_changed(turns: list[tuple[int, int, int]], drafting: bool, llama: Twins) -> None:
    """Each turn keeps all that was said but the last tokens, which another turn replaces."""
    first = PROMPTS[2]
    known, cached = list(first), list[int]()
    with batching(llama.split, draft=draft_for(llama.split) if drafting else None, conversations=2) as batcher:
        for new, dropped, seed in [(0, 0, 0), *turns]:
            prompt = [*known[: max(len(first), len(known) - dropped)], *random_prompt(new, seed)]
            expected = alone(llama.split, prompt, LENGTH)
            before = len(crossed(llama))
            (found,) = written(batcher, [greedy(prompt, LENGTH)])
            reused = shared(cached, prompt[:-1])
            assert found.ids == [expected]
            assert found.end is not None
            assert found.end.reused == reused
            if not drafting:
                assert crossed(llama)[before:] == [len(prompt) - reused, *[1] * (LENGTH - 1)]
            known = [*prompt, *expected]
            cached = known[:-1]


@pytest.mark.parametrize("boundary", SECTIONS.values(), ids=SECTIONS)
def test_whatever_crosses(boundary: dict[str, Any], twins_of: BuildTwins) -> None:
    """Where only tails of prompts cross, each turn begins anew."""
    twins = twins_of("qwen3", (2, 1), sections={"boundary": boundary})
    prompt = PROMPTS[1]
    with batching(twins.split, conversations=1) as batcher:
        for _ in range(3):
            (found,) = written(batcher, [greedy(prompt, LENGTH)])
            assert found.ids == [alone(twins.split, prompt, LENGTH)]
            prompt = [*prompt, *found.ids[0], *random_prompt(5, len(prompt))]
    assert found.end is not None
    assert found.end.reused == (0 if "tail" in boundary else len(prompt) - 5 - LENGTH - 5 - 1)


def test_conversations_side_by_side(llama: Twins) -> None:
    """Each goes on with its own, among others' passes; the oldest makes room."""
    prompts = [random_prompt(20 + number, number) for number in range(5)]
    with batching(llama.split, conversations=4) as batcher:
        first = written(batcher, [greedy(prompt, LENGTH) for prompt in prompts])
        later = [[*prompt, *one.ids[0], 7, 8] for prompt, one in zip(prompts, first, strict=True)]
        second = written(batcher, [greedy(prompt, LENGTH) for prompt in later])
    assert [one.ids[0] for one in second] == [alone(llama.split, prompt, LENGTH) for prompt in later]
    reused = [one.end.reused for one in second if one.end is not None]
    assert sorted(reused)[0] == 0
    assert sum(1 for prompt, number in zip(later, reused, strict=True) if number == len(prompt) - 3) == 4


def test_what_is_not_shared(llama: Twins) -> None:
    """Another owner's, a prompt that only begins alike, several answers, and a conversation that is in use."""
    prompt = PROMPTS[1]
    with batching(llama.split, conversations=4) as batcher:
        (found,) = written(batcher, [greedy(prompt, LENGTH, owner=1)])
        later = [*prompt, *found.ids[0], 9]
        asked = [
            greedy(later, LENGTH, owner=2),
            greedy(later, LENGTH),
            greedy([*prompt[:-1], 9, 9], LENGTH, owner=1),
            greedy(later, LENGTH, owner=1, answers=2),
            greedy(later, LENGTH, owner=1),
            greedy(later, LENGTH, owner=1),
        ]
        ends = [one.end for one in written(batcher, asked)]
    assert [end.reused for end in ends if end is not None] == [0, 0, 0, 0, len(later) - 2, 0]


def test_a_session_that_the_trunk_forgot_is_replayed(llama: Twins) -> None:
    """Nothing is released for it, and the answer is the same."""
    prompt = PROMPTS[1]
    with batching(llama.split, conversations=1) as batcher:
        (found,) = written(batcher, [greedy(prompt, LENGTH)])
        while not len(batcher._kept):
            time.sleep(0.001)  # the answer is given first
        ((_, _, kept),) = batcher._kept._kept.values()
        llama.remote.channel.submit(pb.Close(session=kept.session.id)).result()
        later, before = [*prompt, *found.ids[0][:4], 9, 9], len(crossed(llama))
        (again,) = written(batcher, [greedy(later, LENGTH)])
    assert again.ids == [alone(llama.split, later, LENGTH)]
    assert crossed(llama)[before : before + LENGTH] == [2, *[1] * (LENGTH - 1)]


def test_under_noise_nothing_is_charged_twice(twins_of: BuildTwins) -> None:
    """All turns are one record, and each position of it is released once."""
    twins = twins_of("llama", (2, 1), sections={"boundary": {"forward": DP, "gradient": DP}})
    prompt, releases = list(PROMPTS[1]), []
    with batching(twins.split, conversations=1) as batcher:
        for _ in range(3):
            (found,) = written(batcher, [greedy(prompt, LENGTH)])
            assert found.end is not None
            releases += found.end.releases
            prompt = [*prompt, *found.ids[0], 8]
    assert sum(one.rows for one in releases) == len(prompt) - 2
    assert len({charge.record for one in releases for charge in one.charges}) == 1


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_models_that_look_at_lengths_begin_anew(family: str, kind: str, built: Build) -> None:  # noqa: F811
    model = built(family, kind).split
    with batching(model, conversations=2) as batcher:
        for prompt in (PROMPTS[0], [*PROMPTS[0], *alone(model, PROMPTS[0], LENGTH), 9]):
            (found,) = written(batcher, [greedy(prompt, LENGTH)])
            assert found.ids == [alone(model, prompt, LENGTH)]
            assert found.end is not None
            assert found.end.reused == 0


def test_an_answer_that_nobody_waits_for_leaves_its_conversation(llama: Twins) -> None:
    prompt = PROMPTS[1]
    with batching(llama.split, conversations=1) as batcher:
        sink = Collected()
        running = batcher.submit(GenerationRequest(prompt, 400, settings=greedy(prompt).settings), sink)
        assert sink.begun.wait(60)
        batcher.cancel(running)
        assert sink.wait().error is None
        later = [*prompt, *sink.ids[0][:1], 9]
        (found,) = written(batcher, [greedy(later, LENGTH)])
    assert found.ids == [alone(llama.split, later, LENGTH)]
    assert found.end is not None
    assert found.end.reused >= len(prompt)
