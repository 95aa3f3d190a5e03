"""A barrier over peers: held until every expected one has come, or until patience with the missing ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Barrier(Generic[T]):
    """Collects one item a peer and hands all to ``fire``, again and again.

    The clock starts with a group's first arrival. Whoever is missing when ``patience`` ends is no longer
    expected, until it arrives again.

    Args:
        patience: seconds.
        fire: gets the arrived items by peer; called without the barrier's lock held, from any thread.
    """

    def __init__(self, patience: float, fire: Callable[[dict[str, T]], None]) -> None:
        self._patience = patience
        self._fire = fire
        self._lock = threading.Lock()
        self._expected: set[str] = set()
        self._arrived: dict[str, T] = {}
        self._group = 0
        self._clock: threading.Timer | None = None

    def expect(self, peers: Iterable[str]) -> None:
        """From now on exactly these are waited for."""
        with self._lock:
            self._expected = set(peers)
        self._fire_if(lambda: self._complete())

    def dismiss(self, peer: str) -> None:
        """No longer wait for this one."""
        with self._lock:
            self._expected.discard(peer)
        self._fire_if(lambda: self._complete())

    @property
    def expected(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._expected)

    def arrive(self, peer: str, item: T) -> None:
        """A peer's item; one that comes again before the barrier fires takes the place of the first."""
        with self._lock:
            self._expected.add(peer)
            if not self._arrived:
                self._start_clock(self._group)
            self._arrived[peer] = item
        self._fire_if(lambda: self._complete())

    def _start_clock(self, group: int) -> None:
        self._clock = threading.Timer(self._patience, lambda: self._fire_if(lambda: self._group == group))
        self._clock.daemon = True
        self._clock.start()

    def _complete(self) -> bool:
        return self._expected <= self._arrived.keys()

    def _fire_if(self, due: Callable[[], bool]) -> None:
        with self._lock:
            if not self._arrived or not due():
                return
            if self._clock is not None:
                self._clock.cancel()
            arrived, self._arrived = self._arrived, {}
            self._expected &= arrived.keys()
            self._group += 1
        self._fire(arrived)
