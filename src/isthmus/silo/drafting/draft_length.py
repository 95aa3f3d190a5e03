"""How far ahead to draft: what a drafted token brings against what it costs, from what was measured lately.

A trip that carries tokens accepted with probabilities p₁, p₂, … yields 1 + p₁ + p₁p₂ + … tokens (the trunk adds one of
its own); a further one pays as long as it adds more tokens a second than the trip has so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MOST = 16
"""Longest draft."""
FADING = 0.9
"""What a trip's measurement weighs when the next one is there."""
MEMORY = 40.0
"""Drafted tokens that an acceptance is estimated from, more or less."""


@dataclass(frozen=True)
class Costs:
    """Seconds."""

    round_trip: float
    """Of a trip, whatever it carries."""
    verified: float
    """More for each token that a trip carries."""
    drafted: float
    """For each token that the bridge drafts."""


def pays(reach: float, tokens: float, seconds: float, cost: float) -> bool:
    """Whether a further token raises the tokens a second of a trip.

    Args:
        reach: the probability that it and all before it are accepted.
        tokens: expected of the trip without it.
        seconds: the trip takes without it.
        cost: seconds more with it.
    """
    return reach * seconds > cost * tokens


@dataclass
class Share:
    """How many of the tokens of one kind were accepted lately, with a guess to begin with."""

    accepted: float
    tried: float

    @property
    def value(self) -> float:
        return self.accepted / self.tried

    def note(self, hit: bool) -> None:
        fading = min(1.0, MEMORY / (self.tried + 1))
        self.accepted, self.tried = (self.accepted + hit) * fading, (self.tried + 1) * fading


@dataclass
class Line:
    """Seconds over tokens as a straight line through recent trips, neither falling nor below zero."""

    weight: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    """Of x, y, x², xy."""

    def note(self, tokens: int, seconds: float) -> None:
        new = (tokens, seconds, tokens * tokens, tokens * seconds)
        self.sums = [FADING * old + one for old, one in zip(self.sums, new, strict=True)]
        self.weight = FADING * self.weight + 1

    def fit(self, least_slope: float) -> tuple[float, float]:
        """Seconds of a trip with no token, and of each token.

        Args:
            least_slope: the least that a token is taken to cost, as a share of the mean trip.
        """
        if not self.weight:
            return 0.0, 0.0
        x, y, xx, xy = (one / self.weight for one in self.sums)
        spread = xx - x * x
        slope = (xy - x * y) / spread if spread > 1e-6 else 0.0
        slope = min(max(slope, least_slope * y), y / x)
        return max(0.0, y - slope * x), slope


@dataclass
class DraftLength:
    """Measures trips and drafts, and gives their costs."""

    trips: Line = field(default_factory=Line)
    drafts: Line = field(default_factory=Line)

    def note_trip(self, tokens: int, seconds: float) -> None:
        """A trip that carried this many tokens, the sure one included."""
        self.trips.note(tokens, seconds)

    def note_draft(self, tokens: int, seconds: float) -> None:
        """A draft in which the bridge was asked this many times."""
        if tokens:
            self.drafts.note(tokens, seconds)

    @property
    def costs(self) -> Costs:
        """As measured; before anything was, as if a trip were far longer than a draft."""
        if not self.trips.weight:
            return Costs(1.0, 0.02, 0.1)
        round_trip, verified = self.trips.fit(0.01)
        drafted = self.drafts.sums[1] / self.drafts.sums[0] if self.drafts.weight else 0.1 * round_trip
        return Costs(round_trip, verified, drafted)
