"""Collecting under masks: four turns, all of whom are waited for; of too few nothing is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isthmus.errors import IsthmusError, ProtocolError, RoundLostError
from isthmus.federation.collection import Collected
from isthmus.federation.masked import Masked
from isthmus.updates.flat import Layout
from isthmus.updates.masking import Member, Terms
from isthmus.updates.quantize import Ring
from isthmus.updates.sums import SumFormat
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.barrier import Barrier
from isthmus.wire.channel import Answer
from tests.clock import Clock

NAMES = ("a", "b", "c", "d")
FORMAT = SumFormat(Layout({"x": (3,)}), Ring(len(NAMES), 1.0))


def shares_in(dealt: Any) -> tuple[dict[str, bytes], dict[str, bytes]]:
    return dict(dealt.sealed), dict(dealt.commitments)


class Cohort:
    """A collection and its members."""

    def __init__(self) -> None:
        self.members = {name: Member(name) for name in NAMES}
        adverts = {name: one.advert for name, one in self.members.items()}
        self.found: list[Collected | IsthmusError] = []
        make: Any = lambda fire: Barrier(600.0, fire)  # noqa: E731
        self.masked = Masked(
            adverts, FORMAT, make, self.found.append, context=bytes(32), fewest=3, verify=lambda *_: None
        )

    def deal(self, *names: str) -> dict[str, Answer]:
        terms: Terms = self.masked.terms
        sealed = {name: self.members[name].deal(terms) for name in names}
        deals = {
            name: pb.Deal(round=1, sealed=sealed[name], commitments=self.members[name].commitments) for name in names
        }
        return {name: self.masked.handle(name, deal) for name, deal in deals.items()}

    def send(self, dealt: dict[str, Answer], *names: str) -> dict[str, Answer]:
        answers = {}
        for name in names:
            self.members[name].accept(*shares_in(dealt[name].result(0)))
            whole = np.concatenate([np.full(3, 5, np.int32), FORMAT.ring.encode_share(1.0)])
            words = FORMAT.ring.pack(whole)
            self.members[name].mask(words)
            update = pb.Update(round=1, learned=True, masked=FORMAT.ring.written(words))
            answers[name] = self.masked.handle(name, update)
        return answers

    def reveal(self, sent: dict[str, Answer], *names: str) -> dict[str, Answer]:
        survivors: dict[str, Any] = {name: sent[name].result(0) for name in names}
        agreed = {name: self.masked.handle(name, pb.Agree(round=1, signature=name.encode())) for name in names}
        answers = {}
        for name in names:
            answered: Any = agreed[name].result(0)
            assert dict(answered.signatures) == {other: other.encode() for other in names}
            living = survivors[name]
            shares = self.members[name].reveal(living.alive, living.dropped)
            answers[name] = self.masked.handle(name, pb.Reveal(round=1, shares=shares))
        return answers


def test_the_sum_is_known_after_four_turns() -> None:
    cohort = Cohort()
    answers = cohort.reveal(cohort.send(cohort.deal(*NAMES), *NAMES), *NAMES)
    (found,) = cohort.found
    assert isinstance(found, Collected)
    assert found.weights == dict.fromkeys(NAMES, 1.0)
    assert found.total_KS is not None
    assert found.total_KS[:3].tolist() == [20, 20, 20]
    assert all(answer.result(0) == pb.Accepted() for answer in answers.values())


def test_who_is_silent_is_left_out(clock: Clock) -> None:
    cohort = Cohort()
    sent = cohort.send(cohort.deal(*NAMES), "a", "b", "c")
    clock.run_out()
    cohort.reveal(sent, "a", "b", "c")
    (found,) = cohort.found
    assert isinstance(found, Collected)
    assert list(found.weights) == ["a", "b", "c"]
    assert found.total_KS is not None
    assert found.total_KS[:3].tolist() == [15, 15, 15]


def test_of_too_few_nothing_is_known(clock: Clock) -> None:
    cohort = Cohort()
    dealt = cohort.deal("a", "b")
    clock.run_out()
    assert isinstance(cohort.found[0], RoundLostError)
    with pytest.raises(RoundLostError, match="2 silos dealt"):
        dealt["a"].result(0)


def test_what_is_not_due_is_refused() -> None:
    cohort = Cohort()
    with pytest.raises(RoundLostError, match="too late"):
        cohort.masked.handle("a", pb.Update(round=1))
    with pytest.raises(ProtocolError, match="not expected"):
        cohort.masked.handle("a", pb.Ready())
    with pytest.raises(ProtocolError, match="dealt to others"):
        cohort.masked.handle("a", pb.Deal(round=1, sealed={"stranger": b""}))
    sealed = cohort.members["a"].deal(cohort.masked.terms)
    with pytest.raises(ProtocolError, match="did not commit"):
        cohort.masked.handle("a", pb.Deal(round=1, sealed=sealed, commitments={"a": bytes(64)}))
    with pytest.raises(ProtocolError, match="no more to send"):
        cohort.masked.handle("stranger", pb.Deal(round=1))
    dealt = cohort.deal(*NAMES)
    assert dealt["a"].done()
    with pytest.raises(ProtocolError, match="are masked"):
        cohort.masked.handle("a", pb.Update(round=1, learned=True))


def test_a_new_process_of_a_silo_is_not_waited_for() -> None:
    cohort = Cohort()
    dealt = cohort.deal("a", "b", "c")
    assert cohort.masked.awaits("d")
    assert not cohort.masked.lose("d")
    assert dealt["a"].done()
    assert not cohort.masked.awaits("d")
