"""Patience: how long those who are there wait for others, not counting time in which a server hears nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection

LOOK_AGAIN = 1.0
"""Longest time in seconds between two looks whether somebody is heard again."""


class Heard:
    """When a service last heard of each peer. A client that waits for an answer pings now and then.

    Args:
        seconds: without a sign of those who wait after which the network is taken to be broken: longer than between
            two pings. Infinite: everyone is there, as parties of one process, which do not ping.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._last: dict[str, float] = {}

    def note(self, peer: str) -> None:
        """A request of this peer has come."""
        self._last[peer] = self._clock()

    def silent(self, peers: Collection[str]) -> bool:
        """Whether all of these peers, of which there is one or more, were heard once and are no more."""
        since = self._clock() - self._seconds
        return bool(peers) and all(self._last.get(peer, since) < since for peer in peers)


class Patience:
    """Rings once, after so many seconds, unless it is cancelled. If none of those who wait is heard then, it waits for
    one of them, and after that for as many seconds again: a server that was cut off gives the others time to come back.

    Args:
        seconds: of patience.
        ring: called from another thread.
        waiting: who waits at the moment; called from another thread.
        heard: of the service; None: everyone is taken to be there.
    """

    def __init__(
        self,
        seconds: float,
        ring: Callable[[], None],
        waiting: Callable[[], Collection[str]],
        heard: Heard | None,
    ) -> None:
        self._seconds, self._ring, self._waiting, self._heard = seconds, ring, waiting, heard
        self._lock = threading.Lock()
        self._cancelled = self._paused = False
        self._timer: threading.Timer | None = None
        self._arm(seconds)

    def cancel(self) -> None:
        """Do not ring."""
        with self._lock:
            self._cancelled = True
            if self._timer is not None:
                self._timer.cancel()

    def _arm(self, seconds: float) -> None:
        with self._lock:
            if not self._cancelled:
                self._timer = threading.Timer(seconds, self._look)
                self._timer.daemon = True
                self._timer.start()

    def _look(self) -> None:
        if self._cancelled:
            return
        if self._heard is not None and self._heard.silent(self._waiting()):
            self._paused = True
            self._arm(min(LOOK_AGAIN, self._seconds))
        elif self._paused:
            self._paused = False
            self._arm(self._seconds)
        else:
            self._ring()
