"""Continuous batching: sessions that share passes get what each would get alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from isthmus.errors import FrameError, IsthmusError, OutOfOrderError, UnknownSessionError
from isthmus.trunk.decoding import SessionStep
from isthmus.trunk.scheduler import Job
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.oracle.twins import distance
from tests.unit.trunk.talk import (
    ONE,
    TOLERANCE,
    WAIT,
    Build,
    Story,
    alone,
    assert_equal,
    decoded,
    hidden,
    prompt,
    tokens,
)

STORIES: list[Story] = [
    [prompt(5), ONE, ONE, ONE],
    [prompt(90), ONE, ONE],
    [prompt(3, 40, 17), tokens(1, 1, 1), tokens(1, 1, 1)],
    [prompt(9), tokens(4), tokens(3, forget=2), tokens(5, forget=1), ONE],  # drafts of several positions
    [prompt(4, 4, 4), tokens(1, 1, 1, rows=(0, 0, 2)), tokens(1, 1, 1, rows=(2, 1, 2)), tokens(1, 1, 1)],  # beams
    [prompt(7), tokens(1, 1, 1, rows=(0, 0, 0)), tokens(1, rows=(1,)), ONE],
    [prompt(1), tokens(20), tokens(30, forget=3)],
]


@pytest.mark.parametrize("chunk", [1, 24, 512])
def test_sessions_together_get_what_each_gets_alone(build: Build, chunk: int) -> None:
    trunk = build(chunk=chunk)
    expected = [alone(build(), number, story) for number, story in enumerate(STORIES)]
    silos = [trunk.silo(name) for name in "abc"]
    with trunk.held():
        answers = [silos[number % 3].tell(number, story) for number, story in enumerate(STORIES)]
    for got, wanted in zip(answers, expected, strict=True):
        assert_equal(got, wanted)


def test_sessions_join_and_leave_between_passes(build: Build) -> None:
    trunk, expected = build(), [alone(build(), number, story) for number, story in enumerate(STORIES)]
    silos = [trunk.silo(name) for name in "abc"]

    def tell(number: int) -> None:
        silo = silos[number % 3]
        for _ in range(3):
            for step, frame in enumerate(STORIES[number]):
                assert distance(decoded(silo.send(number, step, frame)), expected[number][step]) <= TOLERANCE
            silo.close(number)

    with ThreadPoolExecutor(len(STORIES)) as threads:
        list(threads.map(tell, range(len(STORIES)), timeout=WAIT))
    assert len(trunk.service._sessions) == 0


def test_steps_of_different_sessions_and_silos_share_a_pass(build: Build) -> None:
    trunk = build()
    silos = [trunk.silo(name) for name in "abc"]
    with trunk.held():
        answers = [silos[number % 3].tell(number, [prompt(3 + number), ONE, ONE]) for number in range(6)]
    for one in answers:
        [decoded(answer) for answer in one]
    assert [sorted(one) for one in trunk.passes] == [[3, 4, 5, 6, 7, 8], [1] * 6, [1] * 6]


def test_forty_sessions_at_once(build: Build) -> None:
    trunk = build()
    stories = [[prompt(1 + number % 11), ONE, tokens(3), tokens(1, forget=2)] for number in range(40)]
    expected = [alone(build(), number, story) for number, story in enumerate(stories[:11])]
    silos = [trunk.silo(name) for name in "abcd"]
    with trunk.held():
        answers = [silos[number % 4].tell(number, story) for number, story in enumerate(stories)]
    for number, got in enumerate(answers):
        if number < 11:
            assert_equal(got, expected[number])
        [decoded(answer) for answer in got]
    assert [len(one) for one in trunk.passes] == [40] * 4
    assert len(trunk.service._sessions) == 40


def test_a_long_prompt_does_not_hold_up_the_next_tokens_of_others(build: Build) -> None:
    trunk, order = build(chunk=32), []
    a, b = trunk.silo("a"), trunk.silo("b")
    decoded(b.send(2, 0, prompt(4)))
    trunk.passes.clear()
    with trunk.held():
        long = a.send(1, 0, prompt(200))
        short = [b.send(2, number, ONE) for number in (1, 2, 3)]
        for name, answer in zip(("long", 1, 2, 3), (long, *short), strict=True):
            answer.add_done_callback(lambda _, name=name: order.append(name))
    whole = decoded(long)
    assert order == [1, 2, 3, "long"]
    assert [sorted(one) for one in trunk.passes] == [[1, 31]] * 3 + [[32]] * 3 + [[11]]
    assert distance(whole, *alone(build(), 1, [prompt(200)])) <= TOLERANCE


def test_rows_of_a_long_prompt_are_computed_in_pieces(build: Build) -> None:
    trunk, story = build(chunk=32), [prompt(70, 3, 20), tokens(1, 1, 1)]
    assert_equal(trunk.silo("a").tell(1, story), alone(build(), 1, story))
    assert trunk.passes[0] == [3, 29]
    assert [sum(one) for one in trunk.passes] == [32, 32, 29, 3]


def test_one_bad_step_gets_its_own_error_and_the_others_their_results(build: Build) -> None:
    trunk = build()
    a, b, c = (trunk.silo(name) for name in "abc")
    story = [prompt(4), ONE, ONE]
    for silo in (a, b, c):
        decoded(silo.send(1, 0, story[0]))
    with trunk.held():
        good = a.send(1, 1, ONE)
        wrong = [b.send(1, 2, ONE), c.send(1, 1, tokens(1, forget=9))]
        good_too = a.send(1, 2, ONE)
        right = b.send(1, 1, ONE)
    expected = alone(build(), 1, story)
    assert_equal([good, good_too, right], [expected[1], expected[2], expected[1]])
    for answer, error in zip(wrong, (OutOfOrderError, FrameError), strict=True):
        with pytest.raises(error):
            answer.result(WAIT)
    assert_equal([c.send(1, 1, ONE)], expected[1:2])


def test_a_pass_waits_a_moment_for_the_sessions_of_the_last_one(build: Build) -> None:
    """Or the first one back would run alone, and the others a pass later."""
    trunk = build()
    silo = trunk.silo("a")
    with trunk.held():
        answers = [silo.send(number, 0, prompt(3)) for number in range(2)]
    [decoded(answer) for answer in answers]
    trunk.service._scheduler.submit(lambda: None).result(WAIT)  # the pass is over, not only answered
    decoding = trunk.service._decoding
    frame = codec.encode(hidden(0, 1, ONE), "fp32")
    jobs = [
        Job(
            decoding,
            ("a", "session", number),
            SessionStep("a", pb.Decode(session=number, step=1, lengths=[1], hidden=frame)),
        )
        for number in range(2)
    ]
    assert decoding.gather(jobs[:1], decoding._until - 1e-6) == ([], pytest.approx(1e-6, rel=0.1))
    assert decoding.gather(jobs, decoding._until - 1e-6)[0] == jobs
    assert decoding.gather(jobs[:1], decoding._until)[0] == jobs[:1]


def test_silos_share_the_tokens_of_a_pass(build: Build) -> None:
    """However many sessions one of them has: the other's long prompt gets half."""
    trunk = build(chunk=32)
    a, b = trunk.silo("a"), trunk.silo("b")
    with trunk.held():
        many = [a.send(number, 0, prompt(8)) for number in range(10)]
        long = b.send(1, 0, prompt(40))
    assert_equal([long], alone(build(), 1, [prompt(40)]))
    for number, answer in enumerate(many):
        assert_equal([answer], alone(build(), number, [prompt(8)]))
    assert trunk.passes[:2] == [[8, 8, 16], [8, 8, 16]]
    assert sum(map(sum, trunk.passes[:7])) == 10 * 8 + 40


def test_a_step_that_fails_its_pass_fails_alone(build: Build) -> None:
    trunk = build()
    a, b = trunk.silo("a"), trunk.silo("b")
    story = [prompt(4), ONE, ONE]
    for silo in (a, b):
        decoded(silo.send(1, 0, story[0]))
    whole = trunk.service._runner.cached_pass

    def failing(h_TD: torch.Tensor, *more: Any) -> torch.Tensor:
        result = whole(h_TD, *more)  # the caches have grown already
        if bool((h_TD == 5.0).any()):
            raise RuntimeError("out of memory")
        return result

    trunk.service._runner.cached_pass = failing  # type: ignore[method-assign]
    with trunk.held():
        bad = b.send(1, 1, ONE, torch.full((1, 32), 5.0))
        good = a.send(1, 1, ONE)
    expected = alone(build(), 1, story)
    assert_equal([good, a.send(1, 2, ONE)], expected[1:])
    with pytest.raises(IsthmusError, match="failed with RuntimeError"):
        bad.result(WAIT)
    with pytest.raises(UnknownSessionError):
        b.send(1, 1, ONE).result(WAIT)
    assert_equal([b.send(1, 0, story[0])], expected[:1])
