"""A barrier over peers: it fires once all expected peers have arrived, or after a timeout."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from isthmus.wire.patience import Heard, Patience

T = TypeVar("T")


class Barrier(Generic[T]):
    """Collects one item from each expected peer, passes them to ``fire``, and starts again.

    The timeout starts with the first arrival of a group. A peer that is missing when it ends is no longer expected,
    until it arrives again.

    Args:
        patience: timeout in seconds, as of ``Patience``.
        fire: called with the arrived items by peer, without the barrier's lock, from any thread.
        heard: who is heard; None: everyone that has arrived is.
    """

    def __init__(self, patience: float, fire: Callable[[dict[str, T]], None], heard: Heard | None = None) -> None:
        self._patience, self._heard = patience, heard
        self._fire = fire
        self._lock = threading.Lock()
        self._expected: set[str] = set()
        self._arrived: dict[str, T] = {}
        self._group = 0
        self._clock: Patience | None = None

    def expect(self, peers: Iterable[str]) -> None:
        """Replace the set of expected peers."""
        with self._lock:
            self._expected = set(peers)
        self._fire_if(lambda: self._complete())

    def dismiss(self, peer: str) -> None:
        """Remove a peer from the expected ones."""
        with self._lock:
            self._expected.discard(peer)
        self._fire_if(lambda: self._complete())

    @property
    def expected(self) -> frozenset[str]:
        """The peers that the barrier waits for."""
        with self._lock:
            return frozenset(self._expected)

    def arrive(self, peer: str, item: T) -> None:
        """Add a peer's item. A second item before the barrier fires replaces the first."""
        with self._lock:
            self._expected.add(peer)
            if not self._arrived:
                self._start_clock(self._group)
            self._arrived[peer] = item
        self._fire_if(lambda: self._complete())

    def _start_clock(self, group: int) -> None:
        found = weakref.ref(self)  # the clock of a barrier that nobody has any more must end, whoever is silent

        def ring() -> None:
            if (barrier := found()) is not None:
                barrier._fire_if(lambda: barrier._group == group)

        def waiting() -> list[str]:
            return [] if (barrier := found()) is None else list(barrier._arrived)

        self._clock = Patience(self._patience, ring, waiting, self._heard)

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
