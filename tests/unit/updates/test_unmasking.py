"""Unmasking: the sum of the living, whoever dropped out, and nothing where shares are missing or false."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from isthmus.errors import ProtocolError
from isthmus.updates.masking import Member, Terms
from isthmus.updates.unmasking import Unmasking

COUNT = 5
NAMES = ("a", "b", "c", "d")


class Sum:
    """Members who have dealt, and their numbers."""

    def __init__(self) -> None:
        self.members = {name: Member(name) for name in NAMES}
        self.terms = Terms(secrets.token_bytes(16), {name: one.advert for name, one in self.members.items()})
        dealt = {name: one.deal(self.terms) for name, one in self.members.items()}
        for name, member in self.members.items():
            dealers = [dealer for dealer in NAMES if dealer != name]
            commitments = {dealer: self.members[dealer].commitments[name] for dealer in dealers}
            member.accept({dealer: dealt[dealer][name] for dealer in dealers}, commitments)
        commitments_of_all = {name: one.commitments for name, one in self.members.items()}
        self.unmasking = Unmasking(self.terms, commitments_of_all, COUNT)
        self.plain = {name: np.full(COUNT, 10 ** (2 + place), np.uint64) for place, name in enumerate(NAMES)}

    def send(self, *names: str) -> None:
        for name in names:
            masked = self.plain[name].copy()
            self.members[name].mask(masked)
            assert not np.array_equal(masked, self.plain[name])
            self.unmasking.add(name, masked)

    def reveal(self, *names: str) -> None:
        alive, dead = sorted(self.unmasking.alive), sorted(self.unmasking.dead)
        for name in names:
            self.unmasking.reveal(name, self.members[name].reveal(alive, dead))


@pytest.fixture
def masked() -> Sum:
    return Sum()


@pytest.mark.parametrize("living", [NAMES, ("a", "c", "d")], ids=["all", "without b"])
def test_the_sum_is_that_of_the_living(masked: Sum, living: tuple[str, ...]) -> None:
    masked.send(*living)
    assert masked.unmasking.dead == set(NAMES) - set(living)
    masked.reveal(*living)
    assert np.array_equal(masked.unmasking.total(), sum(masked.plain[name] for name in living))


def test_numbers_come_once_from_who_dealt_and_before_any_mask_comes_off(masked: Sum) -> None:
    numbers = np.zeros(COUNT, np.uint64)
    masked.send("a", "b", "c")
    for name in ("a", "stranger"):
        with pytest.raises(ProtocolError, match=f"numbers of {name} are not expected"):
            masked.unmasking.add(name, numbers)
    masked.reveal("a")
    with pytest.raises(ProtocolError, match="numbers of d are not expected"):
        masked.unmasking.add("d", numbers)


def test_shares_come_once_from_the_living_and_from_who_holds_them(masked: Sum) -> None:
    masked.send("a", "b", "c")
    with pytest.raises(ProtocolError, match="shares of d are not expected"):
        masked.unmasking.reveal("d", {})
    with pytest.raises(ProtocolError, match="holds no share of 'stranger'"):
        masked.unmasking.reveal("a", {"stranger": b""})
    masked.reveal("a")
    with pytest.raises(ProtocolError, match="shares of a are not expected"):
        masked.unmasking.reveal("a", {})


def test_with_too_few_or_altered_shares_nothing_is_known(masked: Sum) -> None:
    masked.send(*NAMES)
    masked.reveal("a")
    with pytest.raises(ProtocolError):
        masked.unmasking.total()
    masked.reveal("b", "c", "d")
    shares = masked.unmasking._shares["a"]
    point, share = min(shares.items())  # the lowest points are the ones that are used
    shares[point] = bytes([share[0] ^ 1, *share[1:]])
    with pytest.raises(ProtocolError, match="not what it dealt"):
        masked.unmasking.total()
