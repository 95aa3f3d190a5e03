"""A root that tells silos different lists of survivors, with colluders, and silos that lie about shares: no sum of
fewer than the stated number of honest silos is ever read, and no liar stops a round."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import IsthmusError, ProtocolError, RoundLostError
from isthmus.storage.record import RoleDirectory
from isthmus.updates import shamir
from isthmus.updates.flat import Layout
from isthmus.updates.masking import Advert, Member, Pair, Terms
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer
from tests.features.federation.test_masked_rounds import NAMES, WAIT, Federation, Root

Lists = tuple[frozenset[str], frozenset[str]]
SEED, KEY = b"seed", b"key"


class Attack:
    """One sum whose root says to each honest silo what it likes, and what it learns by that."""

    def __init__(self, count: int, colluding: int, draw: random.Random) -> None:
        self.names = [f"{number}" for number in range(count)]
        self.terms = Terms(draw.randbytes(8), {name: Advert(b"", b"", b"") for name in self.names})
        self.colluders = set(draw.sample(self.names, colluding))
        self.honest = [name for name in self.names if name not in self.colluders]
        self.members = {name: self.member(name) for name in self.honest}
        self.shown: dict[str, Lists] = {}
        self.shares: Counter[tuple[str, bytes]] = Counter()
        for name in self.names:
            held = sum(holder in self.colluders for holder in self.terms.holders(name))
            self.shares[name, SEED] = self.shares[name, KEY] = held

    def member(self, name: str) -> Member:
        member = Member(name)
        member.terms, member._peers = self.terms, self.terms.neighbours(name)
        member._held = {owner: Pair(SEED, KEY) for owner in self.terms.holders(name)}
        return member

    def hide(self, name: str, dealers: set[str]) -> None:
        """Pass on no shares of these to this silo."""
        member = self.members[name]
        member._peers = [peer for peer in member._peers if peer not in dealers]
        member._held = {owner: pair for owner, pair in member._held.items() if owner not in dealers}

    def show(self, name: str, lists: Lists) -> None:
        try:
            self.members[name].settle(*lists)
        except ProtocolError:
            return
        self.shown[name] = lists

    def collect(self) -> None:
        """Every silo whose list has a quorum of signatures reveals; colluders sign whatever list there is."""
        signed = Counter(self.shown.values())
        for name, lists in self.shown.items():
            if signed[lists] + len(lists[0] & self.colluders) >= self.terms.quorum:
                for owner, share in self.members[name].reveal(*lists).items():
                    self.shares[owner, share] += 1

    def knows(self, name: str, what: bytes) -> bool:
        return self.shares[name, what] >= self.terms.threshold

    def readable(self) -> list[set[str]]:
        """The smallest groups of honest silos whose sums can be read."""
        left = {name for name in self.honest if not self.knows(name, KEY)}
        groups = []
        while left:
            group, edge = set[str](), {left.pop()}
            closed = True
            while edge:
                name = edge.pop()
                group.add(name)
                hidden = {peer for peer in self.members[name]._peers if peer in left | group}
                closed &= self.knows(name, SEED) and all(name in self.members[peer]._peers for peer in hidden)
                edge |= hidden - group
                left -= hidden
            if closed:
                groups.append(group)
        return groups

    def assert_safe(self) -> None:
        for name in self.honest:
            assert not (self.knows(name, SEED) and self.knows(name, KEY))
        for group in self.readable():
            assert len(group) >= self.terms.quorum - len(self.colluders) > len(self.names) / 3 - 1


def attack(count: int, draw: random.Random) -> Attack:
    """Silos get one of up to three lists, or each its own; each names some alive, often barely enough, others dead."""
    played = Attack(count, draw.randint(0, (count - 1) // 3), draw)
    hiding = draw.choice([0, 0, 0.2])
    for name in played.honest:
        if draw.random() < hiding:
            played.hide(name, set(draw.sample(played.names, draw.randint(0, count // 3))) - {name})
    if draw.random() < 0.5:
        take_turns(played, draw)
        return played
    lists = []
    for _ in range(draw.randint(1, 3)):
        size = draw.choice([played.terms.quorum, draw.randint(played.terms.quorum, count), count])
        first = played.colluders if draw.random() < 0.7 else set()
        rest = draw.sample(sorted(set(played.names) - first), size - len(first))
        alive = frozenset(first | set(rest))
        lists.append((alive, frozenset(played.names) - alive))
    for name in played.honest:
        fitting = [one for one in lists if name in one[0]] or lists
        played.show(name, draw.choice(fitting))
    played.collect()
    return played


def take_turns(played: Attack, draw: random.Random) -> None:
    """By turns, silos are called dead by as many others as their keys need: the sum of the rest, half of a cohort,
    could be read if nobody compared the lists."""
    room = len(played.names) - played.terms.quorum
    targets = draw.sample(played.honest, draw.randint(1, max(1, len(played.honest) // 2)))
    place = 0
    for name in played.honest:
        turn = [targets[(place + step) % len(targets)] for step in range(min(room + 1, len(targets)))]
        dead = frozenset([target for target in turn if target != name][:room])
        place += len(dead)
        played.show(name, (frozenset(played.names) - dead, dead))
    played.collect()


@settings(max_examples=150, deadline=None)
@given(st.integers(4, 40), st.randoms(use_true_random=False))
def test_no_lists_and_no_third_of_colluders_read_a_small_sum(count: int, draw: random.Random) -> None:
    attack(count, draw).assert_safe()


@pytest.mark.parametrize("count", [128, 129, 150, 200])
def test_nor_among_many_silos_with_few_neighbours_each(count: int) -> None:
    for seed in range(3):
        attack(count, random.Random(seed)).assert_safe()


@pytest.mark.parametrize("count", [150, 200])
def test_silos_around_a_victim_that_are_called_dead_do_not_cut_it_off(count: int) -> None:
    played = Attack(count, 0, random.Random(count))
    victim = played.names[0]
    dead = frozenset(played.terms.neighbours(victim)[: count - played.terms.quorum])
    for name in played.honest:
        played.show(name, (frozenset(played.names) - dead, dead))
    played.collect()
    played.assert_safe()


def test_an_honest_root_reads_the_sum_of_all() -> None:
    for count in (4, 20, 150):
        played = Attack(count, 0, random.Random(1))
        for name in played.names:
            played.show(name, (frozenset(played.names), frozenset()))
        played.collect()
        assert played.readable() == [set(played.names)]


class Liar:
    """A root between the silos and the honest one, that changes answers."""

    def __init__(self, root: Root, told: dict[str, pb.Survivors]) -> None:
        self._root, self._told = root, told

    def handle(self, peer: str, request: Message) -> Answer:
        changed: Answer = Answer()

        def pass_on(answer: Answer) -> None:
            if error := answer.exception():
                changed.set_exception(error)
            elif isinstance(answer.result(), pb.Survivors) and peer in self._told:
                changed.set_result(self._told[peer])
            else:
                changed.set_result(answer.result())

        self._root.handle(peer, request).add_done_callback(pass_on)
        return changed


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(RoleDirectory(tmp_path), patience=1.0)


def test_silos_that_were_told_different_survivors_reveal_nothing(federation: Federation) -> None:
    told = {name: pb.Survivors(alive=["a", "b", "c"], dropped=["d"]) for name in "ab"}
    for silo in federation.silos.values():
        silo.channel._service = Liar(federation.root, told)  # type: ignore[assignment]
    ended = federation.finish(federation.begin())
    assert all(isinstance(error, ProtocolError) for error in ended.values())
    assert "2 silos signed the same lists of survivors, 3 are needed" in str(ended["a"])
    assert not any(isinstance(request, pb.Reveal) for _, request in federation.root.seen)


def test_a_liar_about_shares_is_named_and_the_round_goes_on(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    def lie(peer: str, request: Message) -> None:
        if isinstance(request, pb.Reveal) and peer == "a":
            for owner in list(request.shares):
                request.shares[owner] = bytes(33)

    federation.root.lie = lie
    ended: dict[str, IsthmusError | None] = federation.finish(federation.begin())
    assert "a revealed false shares of a, b, c, d" in str(ended.pop("a"))
    assert ended == dict.fromkeys("bcd")
    assert "a revealed false shares" in caplog.text
    federation.assert_learned(dict.fromkeys(NAMES, 1.0))


@pytest.mark.parametrize("field", ["sealing", "masking"])
def test_a_key_with_which_nothing_can_be_agreed_is_refused_before_it_reaches_the_others(
    federation: Federation, field: str
) -> None:
    keys = federation.silos["a"].updates.offer()
    setattr(keys, field, bytes(32))
    with pytest.raises(ProtocolError, match="nothing can be agreed"):
        federation.root.rounds.ready("a", pb.Ready(keys=keys))
    assert federation.finish(federation.begin()) == dict.fromkeys(NAMES)


def test_a_dealer_of_shares_other_than_it_committed_to_is_named_and_the_round_goes_on(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    def lie(peer: str, request: Message) -> None:
        if isinstance(request, pb.Deal) and peer == "d":
            request.commitments["a"] = bytes(64)

    federation.root.lie = lie
    assert federation.finish(federation.begin()) == dict.fromkeys(NAMES)
    assert "the shares of d are not those it committed to" in caplog.text
    federation.assert_learned(dict.fromkeys(NAMES, 1.0))


def split_another_secret(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """d's shares are those that it committed itself to; of another secret than it promised."""
    updates, split = federation.silos["d"].updates, shamir.split

    def begin(plan: pb.Plan, layout: Layout) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(shamir, "split", lambda secret, points, threshold: split(bytes(32), points, threshold))
            type(updates).begin(updates, plan, layout)

    monkeypatch.setattr(updates, "begin", begin)


def seal_nothing(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can open what d seals, so that nobody has anything of it to reveal."""

    def lie(peer: str, request: Message) -> None:
        if isinstance(request, pb.Deal) and peer == "d":
            for holder in "abc":
                request.sealed[holder] = bytes(len(request.sealed[holder]))

    federation.root.lie = lie


@pytest.mark.parametrize("cheat", [split_another_secret, seal_nothing])
def test_a_dealer_of_shares_of_no_secret_costs_one_round_and_is_left_out(
    federation: Federation,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    cheat: Callable[[Federation, pytest.MonkeyPatch], None],
) -> None:
    cheat(federation, monkeypatch)
    ended = federation.finish(federation.begin())
    assert all(isinstance(error, RoundLostError) for error in ended.values())
    assert "d dealt shares of no secret and is left out" in caplog.text
    with pytest.raises(ProtocolError, match="d dealt shares of no secret"):
        federation.silos.pop("d").ask().result(WAIT)
    assert federation.finish(federation.begin("abc"), "abc") == dict.fromkeys("abc")
    federation.assert_learned(dict.fromkeys("abc", 1.0))


def test_withholding_shares_of_another_does_not_get_it_left_out(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """One of four may collude. The sum is lost as a second one drops out; whose fault it is, nobody can tell."""

    def lie(peer: str, request: Message) -> None:
        if isinstance(request, pb.Reveal) and peer == "a":
            del request.shares["d"]
        if isinstance(request, pb.Reveal) and peer == "b":
            raise ProtocolError("dropped out", remedy="")

    federation.root.lie = lie
    ended = federation.finish(federation.begin())
    assert isinstance(ended["c"], RoundLostError)
    assert "left out" not in caplog.text
    federation.root.lie = lambda peer, request: None
    assert federation.finish(federation.begin()) == dict.fromkeys(NAMES)
