"""What one peer of a service has sent and got: requests, refusals and bytes, for the log and for metrics."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeerTraffic:
    """What one peer of a service has sent and got so far."""

    service: str
    peer: str
    connected: bool
    """Whether a stream of it is open."""
    held_bytes: int
    """Bytes of its requests and answers that the server holds."""
    requests: Mapping[str, int]
    """By kind."""
    refusals: Mapping[str, int]
    """By the error's code."""
    received_bytes: int
    sent_bytes: int


class Traffic:
    """Counts of one peer at one service since the server started; the peer's account guards it."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.requests: Counter[str] = Counter()
        """Number of requests by kind, the name of the frame's body."""
        self.refusals: Counter[str] = Counter()
        """Number of answers that are errors, by code."""
        self.received_bytes = self.sent_bytes = 0
        self.last: float | None = None
        """Monotonic time of the last request."""

    def came(self, kind: str, size: int) -> None:
        """Note a request of this kind and this many bytes."""
        self.requests[kind] += 1
        self.received_bytes += size
        self.last = time.monotonic()

    def refuse(self, kind: str, code: str) -> None:
        """Note that a request was answered with an error. The 1st, 2nd, 4th, 8th ... of a code is logged, without its
        message: a peer that sends nothing else fills no disk."""
        self.refusals[code] += 1
        times = self.refusals[code]
        if times & (times - 1) == 0:
            told = "%s of %s was refused: %s (number %d)"
            fields = {"peer": self._peer, "request": kind, "code": code, "times": times}
            log.info(told, kind, self._peer, code, times, extra=fields)

    def seen(self, service: str, *, connected: bool, held_bytes: int) -> PeerTraffic:
        """The counts so far, with what else is known of the peer."""
        requests, refusals = dict(self.requests), dict(self.refusals)
        sizes = self.received_bytes, self.sent_bytes
        return PeerTraffic(service, self._peer, connected, held_bytes, requests, refusals, *sizes)
