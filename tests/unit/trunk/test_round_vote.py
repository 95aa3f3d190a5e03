"""The vote on rounds: who wins, who is waited for, and that a minority takes nothing from silos at work."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.trunk.round_vote import Asked, Beginning, RoundVote, Running
from isthmus.wire.channel import Answer

NAMES = "abcde"


def asked(number: int, named: str, *, open: bool = False) -> Asked:
    return Asked(Beginning(number, open, frozenset(named)), Answer())


def vote_of(**asks: Asked) -> RoundVote:
    vote = RoundVote()
    for peer, one in asks.items():
        vote.ask(peer, one)
    return vote


def running(number: int, workers: str, *, heard: float | None = None, saved: bool = False) -> Running:
    when = time.monotonic() if heard is None else heard
    return Running(number, frozenset(workers), dict.fromkeys(workers, when), saved)


def test_it_is_empty_until_a_silo_asks_and_after_a_round_begins() -> None:
    vote = vote_of()
    assert not vote
    vote.ask("a", asked(1, "a"))
    assert vote
    assert vote.decide(Running()).begins
    assert not vote


def test_it_waits_for_those_whom_most_name() -> None:
    vote = vote_of(a=asked(1, "abc"), b=asked(1, "abc"), d=asked(1, "de"))
    assert vote.awaited(Running()) == {"c"}
    vote.ask("c", asked(1, "abc"))
    assert not vote.awaited(Running())
    outcome = vote.decide(Running())
    assert outcome.beginning.participants == set(NAMES)
    assert outcome.waiting.keys() == set("abcd")


@pytest.mark.parametrize(
    ("numbers", "won"), [({"a": 2, "b": 2, "c": 5}, 2), ({"a": 2, "b": 5}, 5), ({"a": 1, "b": 7, "c": 7}, 7)]
)
def test_most_win_and_of_as_many_the_larger_number(numbers: dict[str, int], won: int) -> None:
    vote = vote_of(**{peer: asked(number, "abc") for peer, number in numbers.items()})
    outcome = vote.decide(Running())
    assert outcome.beginning.number == won
    assert outcome.waiting.keys() == {peer for peer, number in numbers.items() if number == won}
    assert outcome.outvoted.keys() == numbers.keys() - outcome.waiting.keys()


def test_a_silo_has_one_vote_the_last() -> None:
    first, second = asked(1, NAMES), asked(1, "a")
    vote = vote_of(a=first)
    assert vote.ask("a", second) is first
    outcome = vote.decide(Running())
    assert outcome.waiting == {"a": second.answer}
    assert outcome.beginning.participants == {"a"}


def test_what_is_withdrawn_has_no_vote() -> None:
    one = asked(1, "ab")
    vote = vote_of(a=one, b=asked(1, "ab"))
    assert vote.withdraw("a") is one
    assert vote.withdraw("a") is None
    assert vote.awaited(Running()) == {"a"}
    assert vote.others("a") == [Beginning(1, False, frozenset("ab"))]
    assert not vote.others("b")


def test_who_is_at_work_is_waited_for_by_no_more_than_they_are() -> None:
    assert vote_of(a=asked(1, "a")).awaited(running(1, "bc")) == {"b", "c"}
    assert vote_of(a=asked(1, "ab"), b=asked(1, "ab")).awaited(running(1, "cd")) == {"c", "d"}
    assert not vote_of(a=asked(1, "ab"), b=asked(1, "ab")).awaited(running(1, "c"))


def test_the_next_round_after_a_saved_one_takes_as_many() -> None:
    vote = vote_of(a=asked(2, "a"))
    assert not vote.awaited(running(1, "b", saved=True))
    assert vote.awaited(running(1, "b")) == {"b"}
    assert vote_of(a=asked(3, "a")).awaited(running(1, "b", saved=True)) == {"b"}


def test_who_asks_is_not_at_work() -> None:
    vote = vote_of(a=asked(2, "ab"), b=asked(1, "b"))
    assert not vote.awaited(running(1, "b"))
    assert vote.decide(running(1, "b")).begins


def test_an_open_round_waits_for_its_silos_alone() -> None:
    assert vote_of(a=asked(4, "ab", open=True)).awaited(running(3, "cd")) == {"b"}


def test_a_round_ends_for_another_once_its_silos_stand_still() -> None:
    vote = vote_of(a=asked(1, "a"))
    at_work = running(1, "bc", heard=vote.since)
    refused = vote.decide(at_work)
    assert not refused.begins
    assert refused.waiting.keys() == {"a"}
    assert vote, "it goes on"
    assert vote.decide(at_work).begins, "nothing was heard of them since"


@given(
    st.lists(
        st.tuples(st.sampled_from("xy"), st.integers(1, 9), st.sets(st.sampled_from("xy" + NAMES)), st.booleans()),
        max_size=30,
    ),
    st.integers(1, 9),
    st.booleans(),
)
def test_two_silos_take_nothing_from_five_at_work(
    attempts: list[tuple[str, int, set[str], bool]], number: int, saved: bool
) -> None:
    """Whatever they ask for, in whatever order, and whenever the vote is closed, while the others are heard."""
    vote = RoundVote()
    for peer, wanted, named, closes in attempts:
        vote.ask(peer, asked(wanted, "".join(named | {peer})))
        at_work = running(number, NAMES, saved=saved)
        assert vote.awaited(at_work) >= set(NAMES)
        if closes:
            assert not vote.decide(at_work).begins
