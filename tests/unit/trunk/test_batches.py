"""Frames of several silos in one pass: how long they wait for one another, and that a bad one fails alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.errors import FrameError
from isthmus.recipe import TrunkSection
from isthmus.trunk.batches import Backwards, Evaluations, Forwards
from isthmus.trunk.scheduler import SINGLE, Job
from isthmus.wire import isthmus_pb2 as pb

SECTION = TrunkSection(together=3, gather=0.5)
WIDTH = 4


class Stand:
    """In the place of training, runner and codecs: doubles what comes, and refuses rows of one token."""

    expected = 2

    def check_forward(self, silo: str, step: int, lengths: list[int]) -> None:
        self.check_context(lengths)

    def check_context(self, lengths: list[int]) -> None:
        if lengths == [1]:
            raise FrameError("too short", remedy="send more")

    def decode_forward(self, silo: str, request: pb.Forward) -> torch.Tensor:
        return torch.full((sum(request.lengths), WIDTH), float(request.step))

    def forward(self, forwards: list[Any]) -> list[torch.Tensor]:
        return [2 * one.h_TD for one in forwards]

    def full_pass(self, h_TD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        return 2 * h_TD

    def encode_hidden(self, h_TD: torch.Tensor) -> torch.Tensor:
        return h_TD

    def partners(self, silo: str, step: int) -> int:
        return 1


def jobs(*requests: tuple[int, int], since: float = 0.0) -> list[Job]:
    """Of silos, with step and tokens."""
    made = []
    for number, (step, tokens) in enumerate(requests):
        request = (f"silo{number}", pb.Forward(step=step, lengths=[tokens]))
        made.append(Job(SINGLE, (f"silo{number}", "train"), request, since=since))
    return made


def kinds() -> dict[str, Any]:
    stand: Any = Stand()
    return {"forwards": Forwards(stand, stand, SECTION), "evaluations": Evaluations(stand, stand, SECTION)}


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


def test_a_backward_waits_for_those_of_its_pass() -> None:
    stand: Any = Stand()
    alone = [Job(SINGLE, ("a", "train"), ("a", pb.Backward(step=1)), since=0.0)]
    assert Backwards(stand, stand, SECTION).gather(alone, 0.0)[0] == alone


@pytest.mark.parametrize("kind", ["forwards", "evaluations"])
def test_each_silo_gets_its_own_and_a_bad_frame_fails_alone(kind: str) -> None:
    first, bad, last = jobs((3, 2), (1, 1), (5, 3))
    kinds()[kind].run([first, bad, last])
    assert torch.equal(first.done.result(0), torch.full((2, WIDTH), 6.0))
    assert torch.equal(last.done.result(0), torch.full((3, WIDTH), 10.0))
    with pytest.raises(FrameError, match="too short"):
        bad.done.result(0)
