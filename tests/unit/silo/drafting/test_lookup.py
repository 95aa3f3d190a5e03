"""Looking up how a text went on: the longest context counts, and the last time it stood there."""

from __future__ import annotations

from isthmus.silo.drafting.lookup import MAX_CONTEXT, Lookup


def test_longest_context_wins() -> None:
    lookup = Lookup()
    lookup.add([1, 2, 3, 9, 2, 3, 4])
    assert lookup.find([1, 2, 3]) == (9, 3)
    assert lookup.find([7, 3]) == (4, 1)
    assert lookup.find([8]) is None
    assert lookup.find([]) is None


def test_last_time_counts() -> None:
    lookup = Lookup()
    lookup.add([5, 6, 5, 7])
    assert lookup.find([5]) == (7, 1)


def test_learning_goes_on_where_it_stopped() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    whole, pieces = Lookup(), Lookup()
    whole.add(text)
    for end in range(1, len(text) + 1):
        pieces.add(text[:end], end - 1)
    assert whole._next == pieces._next
    assert whole.find(text) == (4, 2)


def test_context_is_bounded() -> None:
    lookup = Lookup()
    lookup.add(list(range(20)))
    assert lookup.find(list(range(10))) == (10, MAX_CONTEXT)
