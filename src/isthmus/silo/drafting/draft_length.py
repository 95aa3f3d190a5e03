"""The number of tokens to draft, from recent measurements of acceptance and time.

A round trip with drafted tokens that are accepted with probabilities p₁, p₂, … yields 1 + p₁ + p₁p₂ + … tokens: the
split model adds one of its own. A further token is worthwhile if it raises the expected tokens per second of the trip.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_DRAFT = 16
"""Largest number of tokens in a draft."""
DECAY = 0.9
"""Factor of an earlier trip's weight for each later trip."""
WINDOW = 40.0
"""Approximate number of recent tokens that an acceptance rate is estimated from."""


@dataclass(frozen=True)
class Costs:
    """The time that drafting and verifying take, in seconds."""

    round_trip: float
    """Seconds per round trip, apart from its tokens."""
    per_verified_token: float
    """Seconds per token that a round trip carries."""
    per_drafted_token: float
    """Seconds per token that the bridge drafts."""


def worthwhile(reach: float, tokens: float, seconds: float, cost: float) -> bool:
    """Whether a further token raises the expected tokens per second of a round trip.

    Args:
        reach: the probability that this token and all before it are accepted.
        tokens: expected tokens of the trip without it.
        seconds: seconds of the trip without it.
        cost: additional seconds with it.
    """
    return reach * seconds > cost * tokens


@dataclass
class AcceptanceRate:
    """A moving estimate of the fraction of accepted tokens of one source, with initial pseudo-counts."""

    accepted: float
    """Weighted number of accepted tokens."""
    tried: float
    """Weighted number of proposed tokens."""

    @property
    def value(self) -> float:
        """The estimated acceptance rate, 0 to 1."""
        return self.accepted / self.tried

    def note(self, hit: bool) -> None:
        """Add a token that was accepted or rejected."""
        decay = min(1.0, WINDOW / (self.tried + 1))
        self.accepted, self.tried = (self.accepted + hit) * decay, (self.tried + 1) * decay


@dataclass
class LinearFit:
    """A weighted least-squares line of seconds over tokens, with slope and intercept of at least zero."""

    weight: float = 0.0
    """Sum of the measurements' weights."""
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    """Weighted sums of x, y, x² and xy, where x is tokens and y is seconds."""

    def note(self, tokens: int, seconds: float) -> None:
        """Add a measurement; earlier ones lose weight."""
        new = (tokens, seconds, tokens * tokens, tokens * seconds)
        self.sums = [DECAY * old + one for old, one in zip(self.sums, new, strict=True)]
        self.weight = DECAY * self.weight + 1

    def fit(self, min_slope: float) -> tuple[float, float]:
        """Intercept (seconds without tokens) and slope (seconds per token); zeros without measurements.

        Args:
            min_slope: smallest slope, as a fraction of the mean seconds.
        """
        if not self.weight:
            return 0.0, 0.0
        x, y, xx, xy = (one / self.weight for one in self.sums)
        spread = xx - x * x
        slope = (xy - x * y) / spread if spread > 1e-6 else 0.0
        slope = min(max(slope, min_slope * y), y / x)
        return max(0.0, y - slope * x), slope


@dataclass
class DraftLength:
    """Measurements of round trips and drafts, and the costs estimated from them."""

    trips: LinearFit = field(default_factory=LinearFit)
    drafts: LinearFit = field(default_factory=LinearFit)

    def note_trip(self, tokens: int, seconds: float) -> None:
        """Add a round trip that carried this many tokens: the drafted ones and the last accepted one."""
        self.trips.note(tokens, seconds)

    def note_draft(self, tokens: int, seconds: float) -> None:
        """Add a draft with this many tokens of the bridge; ignored if there are none."""
        if tokens:
            self.drafts.note(tokens, seconds)

    @property
    def costs(self) -> Costs:
        """The estimated costs. Before the first measurement, those of a round trip much longer than a draft."""
        if not self.trips.weight:
            return Costs(1.0, 0.02, 0.1)
        round_trip, verified = self.trips.fit(0.01)
        drafted = self.drafts.sums[1] / self.drafts.sums[0] if self.drafts.weight else 0.1 * round_trip
        return Costs(round_trip, verified, drafted)
