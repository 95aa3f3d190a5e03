"""Which conversations are kept, for how long, and for whom. Their answers: ``tests/oracle/test_conversations.py``."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.errors import PeerGoneError
from isthmus.gateway.conversations import REPEATS, KeptConversation, KeptConversations


class Pretended:
    """Stands for a session, for caches and for a transcript; notes what is done with it."""

    def __init__(self, sent: int = 4, same: bool = True) -> None:
        self.sent_tokens, self._same = sent, same
        self.cropped, self.left = 0, False

    def same_record(self, first: list[int], row: list[int]) -> bool:
        return self._same

    def crop(self, tokens: int) -> None:
        self.cropped += tokens

    def abandon(self) -> None:
        self.left = True
        raise PeerGoneError("gone", remedy="wait")


def kept(*tokens: int, first: int = 2, **how: Any) -> tuple[KeptConversation, Pretended]:
    session: Any = Pretended(**how)
    return KeptConversation(list(tokens[:first]), list(tokens), session, session, session), session


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


def store(clock: list[float], most: int = 2) -> KeptConversations:
    return KeptConversations(most, 10.0, lambda: clock[0])


@pytest.mark.parametrize(
    ("prompt", "shared"),
    [
        ([4, 5, 6, 7, 8], 4),
        ([4, 5, 6, 9, 8], 3),
        ([4, 5, 6, 7], 3),
        ([4, 5], 1),
        ([4, 9, 6, 7, 8], 0),
        ([4], 0),
        ([], 0),
    ],
)
def test_what_a_prompt_shares(prompt: list[int], shared: int) -> None:
    assert kept(4, 5, 6, 7)[0].shared(prompt) == shared
    assert kept(4, 5, 6, 7, same=False)[0].shared(prompt) == 0


def test_the_best_is_taken_once_and_cropped(clock: list[float]) -> None:
    kept_ones = store(clock)
    (short, _), (long, session) = kept(4, 5, 6), kept(4, 5, 6, 7, 8)
    kept_ones.put(1, long)
    kept_ones.put(1, short)
    assert kept_ones.take(2, [4, 5, 6, 7, 9]) is None
    assert kept_ones.take(1, [4, 5, 6, 7, 9]) is long
    assert (long.tokens, session.cropped, session.left) == ([4, 5, 6, 7], 3, False)
    assert kept_ones.take(1, [4, 5, 6, 7, 9]) is short
    assert kept_ones.take(1, [4, 5, 6, 7, 9]) is None


def test_the_oldest_makes_room_and_time_ends(clock: list[float]) -> None:
    kept_ones = store(clock)
    found = [kept(4, 5, number) for number in range(4)]
    for number, (one, _) in enumerate(found[:3]):
        clock[0] = float(number)
        kept_ones.put(0, one)
    assert [session.left for _, session in found] == [True, False, False, False]
    clock[0] = 11.5
    kept_ones.expire()
    assert [session.left for _, session in found] == [True, True, False, False]
    kept_ones.clear()
    assert found[2][1].left
    assert len(kept_ones) == 0
    none = store(clock, most=0)
    none.put(0, found[3][0])
    assert (len(none), found[3][1].left) == (0, True)


def test_a_session_with_too_many_frames_is_not_kept(clock: list[float]) -> None:
    kept_ones = store(clock)
    for sent, there in ((3 * REPEATS, 1), (3 * REPEATS + 1, 1)):
        one, session = kept(4, 5, 6, sent=sent)
        kept_ones.put(0, one)
        assert len(kept_ones) == there
    assert session.left
