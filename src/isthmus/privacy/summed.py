"""Noise of sums: every silo adds a share of it to whole numbers, and nobody sees them but in a sum.

The distributed discrete Gaussian mechanism (Kairouz, Liu and Steinke 2021). A silo's numbers are clipped, as whole
steps, rounded at random until they are no longer than a stated bound, and each gets a discrete Gaussian draw. A sum of
such draws is nearly, not exactly, a discrete Gaussian; τ below says how nearly, and is paid for.

What is promised: whoever sees sums of at least ``honest`` silos who keep their draws to themselves tells any update of
a silo from any other with a loss of ρ in zero-concentrated privacy. More silos in the sum only add noise. The
neighbours are a silo's numbers and any others in their place, as everywhere here: their distance is twice the bound.

Letters: K numbers, n honest silos.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from isthmus.privacy.analytic import concentrated_loss
from isthmus.privacy.events import ALL, Charge, Path, Release
from isthmus.recipe import NoiseSection, Recipe

UNLUCKY = math.exp(-0.5)
"""How often at most a rounding is too long and is drawn again (β)."""
TAIL = 12
"""Deviations beyond which a sum of draws comes with probability 1e-31."""
COARSEST = 0.5
"""The smallest deviation, in steps, for which the sum of discrete Gaussians has a known bound."""


@dataclass(frozen=True)
class Share:
    """What a silo does to K whole numbers; all lengths in steps."""

    bound: float
    """Largest L2 norm before the noise."""
    deviation: float
    """Of the silo's own discrete Gaussian draw on each number."""
    loss: float
    """ρ, of the honest silos' sum."""
    honest: int
    """n."""

    def event(self, path: Path, round: int, count: int, clip: float, step: float) -> Release:
        """That such numbers leave.

        Args:
            count: K.
            clip: in the numbers' own units, of which a step of the ring is ``step``.
        """
        noise = self.deviation * math.sqrt(self.honest) * step
        charges = (Charge(ALL, concentrated=self.loss),)
        return Release(path, round, 1, count, clip, noise, 0, "summed", charges=charges, honest=self.honest)


@dataclass(frozen=True)
class SumNoise:
    """What one round's release may cost, and how that becomes noise.

    Args:
        honest: n.
        loss: ρ that one round may cost, all in all.
        norms: the part of it that goes to the silos' word whether their update was within the clip; 0: none is given.
        central: the root draws all of the noise, the silos none.
    """

    honest: int
    loss: float
    norms: float = 0.0
    central: bool = False

    def update(self, levels: int, count: int) -> Share:
        """Of an update of K numbers whose clip is so many steps."""
        return self._share(self.loss * (1 - self.norms), rounded(levels, count), count)

    def norm(self, levels: int) -> Share:
        """Of the one number that says on which side of the clip an update was: plus or minus so many steps."""
        return self._share(self.loss * self.norms, levels, 1)

    def reach(self, levels: int, count: int, silos: int) -> int:
        """How far so many silos' noise may take a sum."""
        if self.central:
            return 0
        shares = [self.update(levels, count), *([self.norm(levels)] if self.norms else [])]
        return math.ceil(TAIL * max(share.deviation for share in shares) * math.sqrt(silos))

    def _share(self, loss: float, bound: float, count: int) -> Share:
        deviation = smallest_deviation(loss, bound, count, self.honest)
        return Share(bound, deviation, loss_of(deviation, bound, count, self.honest), self.honest)


def sum_noise(recipe: Recipe) -> SumNoise | None:
    """As this recipe wants it; None: its sums have no noise of their own."""
    federation = recipe.federation
    if federation.noise is None or federation.clip is None:
        return None
    loss = round_loss(federation.noise, recipe.train.rounds, recipe.privacy.delta)
    norms = federation.clip.norms if federation.clip.quantile is not None else 0.0
    return SumNoise(honest_silos(recipe), loss, norms, federation.noise.where == "root")


def naked(event: Release) -> Release:
    """The same release as one sees it who draws the noise."""
    return replace(event, noise=0.0, charges=(Charge(ALL, math.inf),), honest=0)


def honest_silos(recipe: Recipe) -> int:
    """Silos whose noise every sum has, whoever drops out or tells its own: all cohorts' smallest minimum, less the
    colluding."""
    assert recipe.federation.noise is not None
    if recipe.federation.noise.where == "root":
        return 1
    return recipe.tree.smallest() - recipe.federation.noise.colluding


def round_loss(section: NoiseSection, rounds: int, delta: float) -> float:
    """ρ of one round. No silo is drawn by chance, so nothing is gained by sampling."""
    if section.multiplier is not None:
        return 2 / section.multiplier**2
    assert section.epsilon is not None  # the recipe has seen to it
    return concentrated_loss(section.epsilon, delta) / rounds


def rounded(norm: float, count: int) -> float:
    """The L2 norm that K numbers have after rounding if they had this one before, but for ``UNLUCKY`` draws: theorem 1
    of Kairouz et al. Never more than √K steps longer, so it is a bound for lucky draws of any vector."""
    root = math.sqrt(count)
    likely = norm**2 + count / 4 + math.sqrt(2 * math.log(1 / UNLUCKY)) * (norm + root / 2)
    return min(norm + root, math.sqrt(likely))


def loss_of(deviation: float, bound: float, count: int, honest: int) -> float:
    """ρ of the sum of the honest silos' draws for numbers of at most this norm (proposition 14 of Kairouz et al.)."""
    tau = 10 * sum(math.exp(-2 * math.pi**2 * deviation**2 * k / (k + 1)) for k in range(1, honest))
    ratio = 2 * bound / (math.sqrt(honest) * deviation)
    return min(ratio**2 / 2 + tau * count, (ratio + tau * math.sqrt(count)) ** 2 / 2)


def smallest_deviation(loss: float, bound: float, count: int, honest: int) -> float:
    """With which the loss is at most this, to nine digits."""
    low = high = max(COARSEST, bound * math.sqrt(2 / (honest * loss)))  # without τ
    while loss_of(high, bound, count, honest) > loss:
        low, high = high, 2 * high if high == low else high + 2 * (high - low)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if loss_of(middle, bound, count, honest) <= loss else (middle, high)
    return high
