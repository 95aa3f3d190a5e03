"""Which round begins next: what the silos ask for, whom it waits for, and what it may not take away from others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from isthmus.wire.channel import Answer


@dataclass(frozen=True)
class Beginning:
    """A round that silos are about to begin."""

    number: int
    open: bool = False
    """Whether the round has no fixed number of steps."""
    participants: frozenset[str] = frozenset()
    """The silos that one of them names."""
    start: int | None = None
    """The saved round that an open one returns to first; None: it starts where the trunk is."""
    digest: bytes = b""
    """Expected digest of that round's saved state; empty: any."""


@dataclass
class Asked:
    """One silo's request to begin a round, which waits for those of the others."""

    beginning: Beginning
    answer: Answer


@dataclass(frozen=True)
class Running:
    """The round that silos are at work in."""

    number: int = 0
    """0: none."""
    workers: frozenset[str] = frozenset()
    """Its silos that have not finished their steps."""
    heard: Mapping[str, float] = field(default_factory=dict)
    """By silo, the time (of ``time.monotonic``) of its last step or begin."""
    saved: bool = False
    """Whether the trunk has saved its end."""


@dataclass(frozen=True)
class Outcome:
    """What a vote comes to."""

    beginning: Beginning
    begins: bool
    """Whether the round begins; otherwise its silos go on waiting for those at work."""
    waiting: dict[str, Answer]
    """By silo that asks for it, the answer that is due."""
    outvoted: dict[str, Asked]
    """By silo that asks for another, its request. It is no longer in the vote."""


class RoundVote:
    """The requests to begin a round, one of each silo; its caller holds a lock.

    Of several numbers the one wins that most silos ask for, of those the largest. It waits for the silos that most of
    its silos name. While others are at work, it waits for them, too, unless more silos ask for it than are at work (or
    as many, for the next round after theirs is saved).

    Attributes:
        since: when (of ``time.monotonic``) the vote began, or last came to a round that had to wait.
    """

    def __init__(self) -> None:
        self._asks: dict[str, Asked] = {}
        self.since = 0.0

    def __bool__(self) -> bool:
        return bool(self._asks)

    def ask(self, peer: str, asked: Asked) -> Asked | None:
        """Put a silo's request to the vote. Returns an earlier one of this silo, which it replaces."""
        if not self._asks:
            self.since = time.monotonic()
        earlier = self._asks.get(peer)
        self._asks[peer] = asked
        return earlier

    def withdraw(self, peer: str) -> Asked | None:
        """Take a silo's request, if it has one, out of the vote."""
        return self._asks.pop(peer, None)

    @property
    def voters(self) -> frozenset[str]:
        """The silos that have asked."""
        return frozenset(list(self._asks))  # a thread of a clock reads it

    def others(self, peer: str) -> list[Beginning]:
        """What the other silos ask for."""
        return [asked.beginning for other, asked in self._asks.items() if other != peer]

    def awaited(self, running: Running) -> frozenset[str]:
        """The silos whose requests the vote waits for."""
        beginning, asking = self._leading()
        named = Counter(self._asks[peer].beginning.participants for peer in asking)
        most = max(named, key=lambda silos: (named[silos], len(silos)))
        return (most | self._in_the_way(beginning, asking, running)) - self._asks.keys()

    def decide(self, running: Running) -> Outcome:
        """Close the vote without those that it still waits for. A round that silos are at work in ends only if these
        have not been heard since the vote began; otherwise the vote goes on with the requests for this number."""
        beginning, asking = self._leading()
        in_the_way = self._in_the_way(beginning, asking, running)
        begins = all(running.heard.get(peer, 0.0) < self.since for peer in in_the_way)
        outvoted = {peer: asked for peer, asked in self._asks.items() if peer not in asking}
        waiting = {peer: self._asks[peer] for peer in self._asks.keys() & asking}
        self._asks = {} if begins else dict(waiting)
        self.since = time.monotonic()
        return Outcome(beginning, begins, {peer: asked.answer for peer, asked in waiting.items()}, outvoted)

    def _leading(self) -> tuple[Beginning, set[str]]:
        """What most silos ask to begin, the largest number of several, for all silos that these name; and these
        silos."""
        groups: dict[tuple[bool, int], set[str]] = {}
        for peer, asked in self._asks.items():
            groups.setdefault((not asked.beginning.open, asked.beginning.number), set()).add(peer)
        _, chosen = max(groups.items(), key=lambda group: (len(group[1]), group[0]))
        beginnings = [self._asks[peer].beginning for peer in sorted(chosen)]
        named = frozenset().union(*(one.participants for one in beginnings))
        return replace(beginnings[0], participants=named), chosen

    def _in_the_way(self, beginning: Beginning, asking: set[str], running: Running) -> frozenset[str]:
        """The silos at work that ask for no round, unless more silos ask for this one than they are; or as many, and it
        is the next after theirs, which is saved."""
        others = running.workers - self._asks.keys()
        follows = beginning.number == running.number + 1 and running.saved
        return others if not beginning.open and len(asking) < len(others) + (not follows) else frozenset()
