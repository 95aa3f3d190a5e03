"""The distributed discrete Gaussian mechanism: each silo adds a share of the noise to integers that are only summed.

After Kairouz, Liu and Steinke (2021). A silo clips its integers, rounds them at random (and again while they are longer
than a stated bound) and adds a discrete Gaussian draw to each. A sum of such draws is nearly, not exactly, a discrete
Gaussian; τ in ``loss_of`` bounds the difference, which is charged too.

Guarantee: an observer of sums of at least n honest silos' updates (silos that keep their draws secret) distinguishes
any two updates of one silo with a loss of at most ρ in zero-concentrated privacy. More silos in the sum only add noise.
Neighbours replace all of a silo's numbers by any others, so their distance is twice the bound.

Letters: K integers, n honest silos. Lengths and deviations are in steps of the integer grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from isthmus.privacy.analytic import concentrated_loss
from isthmus.privacy.events import ALL, Charge, Path, Release
from isthmus.recipe import NoiseSection, Recipe

REDRAW_PROBABILITY = math.exp(-0.5)
"""Largest probability (β in the paper) that a rounded vector exceeds its bound and is rounded again."""
TAIL_DEVIATIONS = 12
"""Number of deviations that a sum of draws exceeds with probability 1e-31."""
SMALLEST_DEVIATION = 0.5
"""Smallest deviation for which the paper bounds the sum of discrete Gaussians."""


@dataclass(frozen=True)
class NoiseShare:
    """One silo's share of the noise on K integers."""

    bound: float
    """Largest L2 norm before the noise, in steps."""
    deviation: float
    """Standard deviation of the silo's own discrete Gaussian draw on each integer, in steps."""
    loss: float
    """ρ of the sum over the honest silos."""
    honest: int
    """n."""

    def event(self, path: Path, round: int, count: int, clip: float, step: float) -> Release:
        """The release of K integers with this noise, size not yet set.

        Args:
            count: K.
            clip: largest L2 norm in the tensor's own units.
            step: one step of the integer grid in the tensor's own units.
        """
        noise = self.deviation * math.sqrt(self.honest) * step
        charges = (Charge(ALL, concentrated=self.loss),)
        return Release(path, round, 1, count, clip, noise, 0, "summed", charges=charges, honest=self.honest)


@dataclass(frozen=True)
class SumNoise:
    """The privacy loss allowed for one round's sum, and the noise that follows from it.

    Args:
        honest: n.
        loss: ρ of one round in total.
        norms: share of ``loss`` spent on the report whether an update was within the clip; 0: there is no report.
        central: the root adds all of the noise and the silos none.
    """

    honest: int
    loss: float
    norms: float = 0.0
    central: bool = False

    def update(self, levels: int, count: int) -> NoiseShare:
        """The noise on an update of K integers whose clip is ``levels`` steps."""
        return self._share(self.loss * (1 - self.norms), rounded(levels, count), count)

    def norm(self, levels: int) -> NoiseShare:
        """The noise on the report whether an update was within the clip: one integer, ``levels`` or ``-levels``."""
        return self._share(self.loss * self.norms, levels, 1)

    def reach(self, levels: int, count: int, silos: int) -> int:
        """The largest absolute value, in steps, of the noise of this many silos on one integer of the sum (see
        ``TAIL_DEVIATIONS``)."""
        if self.central:
            return 0
        shares = [self.update(levels, count), *([self.norm(levels)] if self.norms else [])]
        return math.ceil(TAIL_DEVIATIONS * max(share.deviation for share in shares) * math.sqrt(silos))

    def _share(self, loss: float, bound: float, count: int) -> NoiseShare:
        deviation = smallest_deviation(loss, bound, count, self.honest)
        return NoiseShare(bound, deviation, loss_of(deviation, bound, count, self.honest), self.honest)


def sum_noise(recipe: Recipe) -> SumNoise | None:
    """The noise of this recipe's sums; None if it asks for none."""
    federation = recipe.federation
    if federation.noise is None or federation.clip is None:
        return None
    loss = round_loss(federation.noise, recipe.train.rounds, recipe.privacy.delta)
    norms = federation.clip.norms if federation.clip.quantile is not None else 0.0
    return SumNoise(fewest_honest_silos(recipe), loss, norms, federation.noise.where == "root")


def without_noise(event: Release) -> Release:
    """The release as the party that draws the noise sees it: no noise, and an unbounded charge."""
    return replace(event, noise=0.0, charges=(Charge(ALL, math.inf),), honest=0)


def fewest_honest_silos(recipe: Recipe) -> int:
    """The number of silos whose secret noise every sum contains: the smallest minimum of all cohorts minus the silos
    that collude. 1 where the root draws the noise."""
    assert recipe.federation.noise is not None
    if recipe.federation.noise.where == "root":
        return 1
    return recipe.tree.smallest() - recipe.federation.noise.colluding


def round_loss(section: NoiseSection, rounds: int, delta: float) -> float:
    """ρ of one round. All silos take part in every round, so there is no amplification by sampling."""
    if section.multiplier is not None:
        return 2 / section.multiplier**2
    assert section.epsilon is not None  # the recipe's checks guarantee it
    return concentrated_loss(section.epsilon, delta) / rounds


def rounded(norm: float, count: int) -> float:
    """The L2 norm of K integers rounded at random from numbers of this norm, except with probability
    ``REDRAW_PROBABILITY`` (Kairouz et al. 2021, theorem 1). At most √K steps above ``norm``."""
    root = math.sqrt(count)
    likely = norm**2 + count / 4 + math.sqrt(2 * math.log(1 / REDRAW_PROBABILITY)) * (norm + root / 2)
    return min(norm + root, math.sqrt(likely))


def loss_of(deviation: float, bound: float, count: int, honest: int) -> float:
    """ρ of the sum of the honest silos' draws on K integers of at most this L2 norm (Kairouz et al. 2021, prop. 14)."""
    tau = 10 * sum(math.exp(-2 * math.pi**2 * deviation**2 * k / (k + 1)) for k in range(1, honest))
    ratio = 2 * bound / (math.sqrt(honest) * deviation)
    return min(ratio**2 / 2 + tau * count, (ratio + tau * math.sqrt(count)) ** 2 / 2)


def smallest_deviation(loss: float, bound: float, count: int, honest: int) -> float:
    """The smallest deviation of a silo's draw, to nine digits, with which ``loss_of`` is at most ``loss``."""
    low = high = max(SMALLEST_DEVIATION, bound * math.sqrt(2 / (honest * loss)))  # exact if τ were 0
    while loss_of(high, bound, count, honest) > loss:
        low, high = high, 2 * high if high == low else high + 2 * (high - low)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if loss_of(middle, bound, count, honest) <= loss else (middle, high)
    return high
