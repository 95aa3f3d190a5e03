"""Masked sums against plain integer sums, for every way in which members can drop out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import ProtocolError
from isthmus.updates.graph import sparse_graph
from isthmus.updates.masking import Advert, Member, Terms, stream
from isthmus.updates.quantize import Words
from isthmus.updates.unmasking import Unmasking

COUNT = 17
Names = Sequence[str]


class Cohort:
    """Members and what they sum, played through with an aggregator in between."""

    def __init__(self, count: int, *, degree: int | None = None, size: int = COUNT) -> None:
        draw = np.random.default_rng(count)
        self.names = [f"silo-{number:03d}" for number in range(count)]
        self.members = {name: Member(name) for name in self.names}
        self.terms = Terms(b"round 1", {name: one.advert for name, one in self.members.items()}, degree)
        self.values: dict[str, Words] = {name: draw.integers(0, 2**64, size, dtype=np.uint64) for name in self.names}
        self.size = size

    def deal(self, dealers: Iterable[str]) -> Unmasking:
        """These deal, and each gets the shares of those of its neighbours that did."""
        sealed = {name: self.members[name].deal(self.terms) for name in dealers}
        for name in sealed:
            self.members[name].accept(*self.for_member(name, sealed))
        return Unmasking(self.terms, {name: self.members[name].commitments for name in sealed}, self.size)

    def for_member(
        self, name: str, sealed: Mapping[str, Mapping[str, bytes]]
    ) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """The shares sealed for this member, and their dealers' commitments."""
        dealers = [other for other in sealed if name in sealed[other]]
        return (
            {other: sealed[other][name] for other in dealers},
            {other: self.members[other].commitments[name] for other in dealers},
        )

    def masked(self, name: str) -> Words:
        masked = self.values[name].copy()
        self.members[name].mask(masked)
        return masked

    def send(self, tally: Unmasking, names: Iterable[str]) -> None:
        for name in names:
            tally.add(name, self.masked(name))

    def unmask(self, tally: Unmasking, names: Iterable[str]) -> None:
        for name in names:
            tally.reveal(name, self.members[name].reveal(tally.alive, tally.dead))

    def plain(self, names: Iterable[str]) -> Words:
        return sum((self.values[name] for name in names), np.zeros(self.size, np.uint64))

    def sum(self, dealers: Names, senders: Names, revealers: Names) -> Words:
        tally = self.deal(dealers)
        self.send(tally, senders)
        self.unmask(tally, revealers)
        return tally.total()


def dropouts(count: int, most: int) -> Iterable[tuple[set[int], set[int], set[int]]]:
    """Every way in which at most so many of the members go: before dealing, before sending, before revealing."""
    for gone in range(most + 1):
        for who in itertools.combinations(range(count), gone):
            for when in itertools.product(range(3), repeat=gone):
                yield tuple({one for one, moment in zip(who, when, strict=True) if moment == at} for at in range(3))  # type: ignore[misc]


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_the_sum_is_exact_for_every_pattern_of_dropouts_of_less_than_a_third(count: int) -> None:
    for before_dealing, before_sending, before_revealing in dropouts(count, (count - 1) // 3):
        cohort = Cohort(count)
        dealers = [name for number, name in enumerate(cohort.names) if number not in before_dealing]
        senders = [name for number, name in enumerate(cohort.names) if name in dealers and number not in before_sending]
        revealers = [
            name for number, name in enumerate(cohort.names) if name in senders and number not in before_revealing
        ]
        found = cohort.sum(dealers, senders, revealers)
        np.testing.assert_array_equal(found, cohort.plain(senders))


@pytest.mark.parametrize("seed", range(3))
def test_the_sum_of_a_hundred_is_exact_when_a_random_third_drops_out(seed: int) -> None:
    draw, cohort = random.Random(seed), Cohort(100)
    gone = draw.sample(cohort.names, 33)
    moments = [draw.randrange(3) for _ in gone]
    dealers, senders, revealers = (
        [
            name
            for name in cohort.names
            if name not in {one for one, at in zip(gone, moments, strict=True) if at <= stage}
        ]
        for stage in range(3)
    )
    np.testing.assert_array_equal(cohort.sum(dealers, senders, revealers), cohort.plain(senders))


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 20), st.sampled_from([4, 6]), st.randoms(use_true_random=False))
def test_sparse_sums_are_exact_as_long_as_more_than_two_thirds_of_each_neighbourhood_stay(
    count: int, degree: int, draw: random.Random
) -> None:
    cohort = Cohort(count, degree=degree)
    gone = draw.choice(cohort.names)
    stay = [name for name in cohort.names if name != gone]
    np.testing.assert_array_equal(cohort.sum(cohort.names, stay, stay), cohort.plain(stay))


@given(st.integers(3, 40), st.sampled_from([None, 2, 4, 6, 10]))
def test_neighbours_are_each_others(count: int, degree: int | None) -> None:
    adverts = {f"{number}": Member(f"{number}").advert for number in range(3)}
    terms = Terms(b"x", {f"{number}": adverts["0"] for number in range(count)}, degree)
    for name in terms.order:
        neighbours = terms.neighbours(name)
        assert len(set(neighbours)) == len(neighbours)
        assert name not in neighbours
        assert all(name in terms.neighbours(other) for other in neighbours)
        assert 3 * terms.threshold > 2 * len(terms.holders(name))


@pytest.mark.parametrize(("count", "most"), [(3, 0), (4, 1), (100, 33), (200, sparse_graph(200).threshold - 1)])
def test_of_the_holders_of_a_secret_fewer_than_a_third_of_all_or_than_can_reveal_collude(count: int, most: int) -> None:
    terms = Terms(b"", {f"{number}": Advert(b"", b"", b"") for number in range(count)})
    assert terms.colluding == most


def test_what_a_member_sends_looks_like_noise_and_never_twice_the_same() -> None:
    """A recording aggregator: zeros and ones sent by the same silo cannot be told apart."""
    first, second = Cohort(3, size=4096), Cohort(3, size=4096)
    for cohort, value in ((first, 0), (second, 1)):
        cohort.deal(cohort.names)
        cohort.values = {name: np.full(cohort.size, value, np.uint64) for name in cohort.names}
    for cohort in (first, second):
        for name in cohort.names:
            masked = cohort.masked(name)
            bits = np.unpackbits(masked.view(np.uint8)).mean()
            assert abs(bits - 0.5) < 0.01
            assert len(np.unique(masked)) > 4090
    assert not np.array_equal(stream(b"a" * 32, 9), stream(b"b" * 32, 9))


def test_no_proper_subset_of_the_masks_of_pairs_cancels() -> None:
    """Without the masks of their own seeds, two of three members' numbers stay hidden until the third's are added."""
    cohort = Cohort(3)
    tally = cohort.deal(cohort.names)
    masked = {name: cohort.masked(name) for name in cohort.names}
    own = {name: stream(cohort.members[name]._seed, COUNT) for name in cohort.names}
    bare = {name: masked[name] - own[name] for name in cohort.names}
    for names in (*itertools.combinations(cohort.names, 1), *itertools.combinations(cohort.names, 2)):
        assert not np.any(sum((bare[name] for name in names), np.zeros(COUNT, np.uint64)) == cohort.plain(names))
    assert np.array_equal(sum(bare.values(), np.zeros(COUNT, np.uint64)), cohort.plain(cohort.names))
    assert tally.alive == set()


# --- what is refused


def dealt(count: int = 4) -> tuple[Cohort, Unmasking]:
    cohort = Cohort(count)
    return cohort, cohort.deal(cohort.names)


def test_two_are_too_few() -> None:
    with pytest.raises(ProtocolError, match="would reveal what each one sent"):
        Cohort(2)


def test_a_sum_with_other_keys_than_the_members_is_refused() -> None:
    cohort = Cohort(3)
    cohort.members["silo-000"] = Member("silo-000")
    with pytest.raises(ProtocolError, match="without the keys of silo-000"):
        cohort.members["silo-000"].deal(cohort.terms)


@pytest.mark.parametrize("change", ["altered", "another's", "of another sum"])
def test_shares_that_are_not_what_was_sealed_for_this_member_are_left_out(change: str) -> None:
    cohort = Cohort(3)
    sealed = {name: member.deal(cohort.terms) for name, member in cohort.members.items()}
    data = sealed["silo-001"]["silo-000"]
    if change == "altered":
        data = bytes([data[0] ^ 1]) + data[1:]
    if change == "another's":
        data = sealed["silo-001"]["silo-002"]
    if change == "of another sum":
        terms = Terms(b"round 2", cohort.terms.adverts)
        data = cohort.members["silo-001"].deal(terms)["silo-000"]
    member = cohort.members["silo-000"]
    _, commitments = cohort.for_member("silo-000", sealed)
    member.accept({"silo-001": data, "silo-002": sealed["silo-002"]["silo-000"]}, commitments)
    assert list(member.suspects) == ["silo-001"]
    assert "shares of silo-001" in member.suspects["silo-001"]
    assert member.reveal(cohort.names, []).keys() == {"silo-000", "silo-002"}


def test_shares_of_strangers_and_too_few_are_refused() -> None:
    cohort = Cohort(4)
    for member in cohort.members.values():
        member.deal(cohort.terms)
    with pytest.raises(ProtocolError, match="no neighbour"):
        cohort.members["silo-000"].accept({"mallory": b""}, {})
    with pytest.raises(ProtocolError, match="1 dealt shares where 3 are needed"):
        cohort.members["silo-000"].accept({}, {})


def test_both_shares_of_one_member_are_never_given_out() -> None:
    cohort, tally = dealt()
    cohort.send(tally, cohort.names[:3])
    member = cohort.members["silo-000"]
    living, dead = cohort.names[:3], cohort.names[3:]
    with pytest.raises(ProtocolError, match="is said to live and to be dead"):
        member.reveal(cohort.names, dead)
    with pytest.raises(ProtocolError, match="not said whether silo-003 lives"):
        member.reveal(living, [])
    with pytest.raises(ProtocolError, match="2 living neighbours where 3 are needed"):
        member.reveal(cohort.names[:2], cohort.names[2:])
    with pytest.raises(ProtocolError, match="silo-000 is said to be dead"):
        member.reveal(cohort.names[1:], ["silo-000"])
    assert member.reveal(living, dead).keys() == set(cohort.names)
    with pytest.raises(ProtocolError, match="once a sum"):
        member.reveal(living, dead)


def test_numbers_of_strangers_and_numbers_sent_twice_are_refused() -> None:
    cohort, tally = dealt()
    cohort.send(tally, ["silo-000"])
    for name in ("silo-000", "mallory"):
        with pytest.raises(ProtocolError, match="not expected"):
            tally.add(name, cohort.values["silo-000"])
    cohort.send(tally, cohort.names[1:])
    cohort.unmask(tally, cohort.names[:1])
    with pytest.raises(ProtocolError, match="not expected"):
        tally.reveal("silo-000", {})
    with pytest.raises(ProtocolError, match="holds no share"):
        tally.reveal("silo-001", {"mallory": b""})


def test_too_few_shares_end_the_sum_with_nothing_known() -> None:
    cohort, tally = dealt()
    cohort.send(tally, cohort.names)
    cohort.unmask(tally, cohort.names[:2])
    with pytest.raises(ProtocolError, match="2 shares of a secret of which 3 are needed"):
        tally.total()


@pytest.mark.parametrize(("gone", "what"), [(set(), "mask"), ({"silo-003"}, "key")])
def test_false_shares_are_found_named_and_left_out(gone: set[str], what: str) -> None:
    cohort, tally = dealt(6)
    living = [name for name in cohort.names if name not in gone]
    cohort.send(tally, living)
    for name in living:
        shares = cohort.members[name].reveal(tally.alive, tally.dead)
        if name == "silo-001":
            shares["silo-003"] = bytes(33)
        tally.reveal(name, shares)
    assert tally.liars == {"silo-001": {"silo-003"}}
    if what == "mask":
        np.testing.assert_array_equal(tally.total(), cohort.plain(living))
    else:
        with pytest.raises(ProtocolError, match="4 shares of a secret of which 5"):
            tally.total()
