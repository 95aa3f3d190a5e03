"""Frames of several silos in one pass: how long they wait for one another, and that a bad one fails alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.errors import FrameError
from isthmus.recipe import TrunkSection
from isthmus.trunk.batches import SPARE_STEPS, Backwards, Evaluation, Evaluations, Forwards
from isthmus.trunk.scheduler import SINGLE, Job
from isthmus.wire import isthmus_pb2 as pb

SECTION = TrunkSection(together=3, gather=0.5)
WIDTH = 4


class Stand:
    """In the place of training, runner and codecs: doubles what comes, and refuses rows of one token."""

    expected = 2
    hoarders: tuple[str, ...] = ()
    passes = (None, "first", "second", "second")

    def check_forward(self, silo: str, step: int, lengths: list[int]) -> None:
        self.check_context(lengths)

    def check_context(self, lengths: list[int]) -> None:
        if lengths == [1]:
            raise FrameError("too short", remedy="send more")

    def decode_forward(self, silo: str, request: pb.Forward) -> torch.Tensor:
        return torch.full((sum(request.lengths), WIDTH), float(request.step))

    def forward(self, forwards: list[Any]) -> list[torch.Tensor]:
        return [2 * one.h_TD for one in forwards]

    def passed(self, silo: str) -> range:
        return range(3)

    def full_pass(self, h_TD: torch.Tensor, lengths: list[int], *more: Any) -> torch.Tensor:
        return 2 * h_TD

    def encode_answer(self, silo: str, request: Any, h_TD: torch.Tensor) -> torch.Tensor:
        return h_TD

    def pass_of(self, silo: str, step: int) -> Any:
        return self.passes[step]

    def opened(self, silo: str) -> int:
        return SPARE_STEPS + 2 if silo in self.hoarders else SPARE_STEPS + 1

    def partners(self, silo: str, step: int) -> int:
        return 2


def jobs(*requests: tuple[int, int], since: float = 0.0, evaluate: bool = False) -> list[Job]:
    """Of silos, with step and tokens."""
    made = []
    for number, (step, tokens) in enumerate(requests):
        silo, request = f"silo{number}", pb.Forward(step=step, lengths=[tokens])
        asked: Any = Evaluation(silo, request) if evaluate else (silo, request)
        made.append(Job(SINGLE, (silo, "train"), asked, since=since))
    return made


def kinds() -> dict[str, Any]:
    stand: Any = Stand()
    return {"forwards": Forwards(stand, stand, SECTION), "evaluations": Evaluations(stand, stand, SECTION)}


def test_a_silo_with_many_open_steps_shares_no_pass() -> None:
    stand: Any = Stand()
    stand.hoarders = ("silo0",)
    forwards = Forwards(stand, stand, SECTION)
    both = jobs((1, 2), (1, 2))
    assert forwards.gather(both, 0.2) == ([both[0]], 0.0)
    assert forwards.gather(both[::-1], 0.5)[0] == [both[1]]


def test_a_forward_waits_for_those_expected_but_not_for_ever() -> None:
    forwards = kinds()["forwards"]
    assert forwards.gather(jobs((1, 2)), 0.2) == ([], pytest.approx(0.3))
    both = jobs((1, 2), (1, 2))
    assert forwards.gather(both, 0.2)[0] == both
    late = jobs((1, 2))
    assert forwards.gather(late, 0.5)[0] == late


def test_no_more_than_together_go_in_one_pass() -> None:
    many = jobs(*[(1, 2)] * 5)
    assert len(kinds()["forwards"].gather(many, 0.0)[0]) == 3
    assert len(kinds()["evaluations"].gather(many, 0.0)[0]) == 3


def test_a_backward_waits_for_those_of_its_pass_alone() -> None:
    stand: Any = Stand()
    gather = Backwards(stand, stand, SECTION).gather
    first, second, third, unknown = (
        Job(SINGLE, (f"silo{step}", "train"), (f"silo{step}", pb.Backward(step=step)), since=0.0)
        for step in (1, 2, 3, 0)
    )
    assert gather([first, second], 0.1) == ([], pytest.approx(0.4))
    assert gather([first, second, third], 0.1)[0] == [second, third]
    assert gather([first, unknown], 0.1)[0] == [unknown], "to be refused"
    assert gather([first, second], 0.5)[0] == [first]


@pytest.mark.parametrize("kind", ["forwards", "evaluations"])
def test_each_silo_gets_its_own_and_a_bad_frame_fails_alone(kind: str) -> None:
    first, bad, last = jobs((3, 2), (1, 1), (5, 3), evaluate=kind == "evaluations")
    kinds()[kind].run([first, bad, last])
    assert torch.equal(first.done.result(0), torch.full((2, WIDTH), 6.0))
    assert torch.equal(last.done.result(0), torch.full((3, WIDTH), 10.0))
    with pytest.raises(FrameError, match="too short"):
        bad.done.result(0)


def test_a_large_evaluation_is_computed_in_pieces_of_whole_sequences() -> None:
    stand: Any = Stand()
    evaluations = Evaluations(stand, stand, TrunkSection(together=3, chunk=8))
    large, small = (
        Job(SINGLE, (silo, "evaluate"), Evaluation(silo, pb.Forward(step=step, lengths=lengths)))
        for silo, step, lengths in (("a", 1, [4, 4, 20, 2]), ("b", 2, [3]))
    )
    evaluations.run([large, small])
    assert torch.equal(small.done.result(0), torch.full((3, WIDTH), 4.0))
    turns = 1
    while not large.done.done():
        evaluations.run([large])
        turns += 1
    assert turns == 4
    assert torch.equal(large.done.result(0), torch.full((30, WIDTH), 2.0))


@pytest.mark.parametrize("kind", ["forwards", "evaluations"])
def test_a_pass_that_raises_fails_the_job_alone_that_is_to_blame(kind: str) -> None:
    class Raising(Stand):
        def decode_forward(self, silo: str, request: pb.Forward) -> torch.Tensor:
            return torch.full((sum(request.lengths), WIDTH), float(request.step))

        def full_pass(self, h_TD: torch.Tensor, lengths: list[int], *more: Any) -> torch.Tensor:
            if bool((h_TD == 7.0).any()):
                raise RuntimeError("out of memory")
            return 2 * h_TD

        def next_masks(self, silo: str) -> str:
            return silo

        def forward(self, forwards: list[Any]) -> list[torch.Tensor]:
            return [self.full_pass(torch.cat([one.h_TD for one in forwards]), [])[: len(one.h_TD)] for one in forwards]

    stand: Any = Raising()
    made = Forwards(stand, stand, SECTION) if kind == "forwards" else Evaluations(stand, stand, SECTION)
    first, bad, last = jobs((3, 2), (7, 2), (3, 3), evaluate=kind == "evaluations")
    made.run([first, bad, last])
    assert torch.equal(first.done.result(0), torch.full((2, WIDTH), 6.0))
    assert torch.equal(last.done.result(0), torch.full((3, WIDTH), 6.0))
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.done.result(0)
