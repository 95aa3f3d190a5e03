"""The trunk's answers about examples that come again cross as differences; whatever is lost, training is the same."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from isthmus.wire import isthmus_pb2 as pb
from tests.unit.silo.conftest import once_model, start  # noqa: F401  (fixtures)
from tests.unit.silo.parties import EPOCHS, ROWS, TOKENS, Party, Start

CODEC = {"forward_up": "range-0.25", "forward_down": "range-0.25", "gradient_up": "range-0.25"}


def differing(start: Start, **options: Any) -> Party:  # noqa: F811
    return start(noise=0.0, boundary={"codec": CODEC, "differences": True}, **options)


class Answers:
    """What the trunk answers to forwards from here on."""

    def __init__(self, party: Party) -> None:
        self.seen: list[pb.Hidden] = []
        submit = party.tap.submit

        def watched(request: Any) -> Any:
            answer = submit(request)
            if isinstance(request, pb.Forward):
                answer.add_done_callback(lambda done: self.seen.append(done.result()))  # type: ignore[arg-type]
            return answer

        party.tap.submit = watched  # type: ignore[method-assign]

    def taken(self) -> tuple[int, int, int]:
        """Sequences that were answered whole, those that were as differences, and bytes of all."""
        changed = sum(len(one.changed) for one in self.seen)
        rows = sum(one.hidden.rows for one in self.seen)
        size = sum(len(one.hidden.data) + len(one.changes.data) for one in self.seen)
        self.seen.clear()
        return rows, changed, size


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_later_answers_are_differences_and_smaller(start: Start, micro_batches: int) -> None:  # noqa: F811
    party = differing(start)
    answers = Answers(party)
    party.epoch(micro_batches=micro_batches)
    rows, changed, first = answers.taken()
    assert (rows, changed) == (sum(TOKENS), 0)
    for _ in range(EPOCHS - 1):
        party.epoch(micro_batches=micro_batches)
        rows, changed, later = answers.taken()
        assert (rows, changed) == (0, len(ROWS))
        assert later < first


def test_what_the_silo_reads_is_what_the_trunk_computed(start: Start) -> None:  # noqa: F811
    party = differing(start)
    exact = start(noise=0.0)
    for _ in range(3):
        ours, theirs = party.logits(), exact.logits()
        off = float((ours - theirs).square().mean().sqrt() / theirs.std())
        assert 0.0 < off < 0.2


@pytest.mark.parametrize("lost", ["trunk/answers", "silo/released/answers"])
def test_a_side_that_lost_its_answers_costs_bytes_alone(start: Start, lost: str) -> None:  # noqa: F811
    party = differing(start)
    party.logits()
    shutil.rmtree(party.folder / lost)
    party.start_trunk()
    party.start_silo()
    answers = Answers(party)
    party.logits()
    assert answers.taken()[:2] == (sum(TOKENS), 0)
    party.logits()
    assert answers.taken()[:2] == (0, len(ROWS))


def test_both_sides_start_again_where_they_were(start: Start) -> None:  # noqa: F811
    party = differing(start)
    party.logits()
    party.start_trunk()
    party.start_silo()
    answers = Answers(party)
    party.logits()
    assert answers.taken()[:2] == (0, len(ROWS))


def test_no_answer_is_kept_without_the_key(start: Start) -> None:  # noqa: F811
    party = start(noise=0.0, codec="range-0.5")
    party.epoch()
    assert not any(request.answered for request in party.tap.take(pb.Forward))
    assert not (party.folder / "trunk" / "answers").exists()
