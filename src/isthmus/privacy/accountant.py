"""The accountant: composes the charges of releases into epsilons.

What the figures mean. A *record's* epsilon composes all releases of that record's own vectors: hidden states and
gradients, by whatever unit they were clipped. Records are disjoint, so over a silo the figures do not add up; the
silo's is that of its *worst record* (parallel composition). It holds for what a record's vectors tell, all else given:
the adapters of bottom and top carry traces of other records into them (with a frozen bottom, into gradients only), and
an update is about all records at once. Both are covered by the *silo's sum*: everything that left, updates too,
composed as if it were about one record. It is the epsilon of the silo's whole text, an upper bound for anything less.

Charges follow from lengths and factors, never from values, and later releases may depend on earlier ones: Gaussian
charges then add up as μ² (Dong, Roth and Su 2022), and stopping a record when its sum is reached is a privacy filter
(Koskela, Tobaben and Honkela 2022; for individual records Feldman and Zrnic 2021). Noise in whole numbers is charged in
concentrated privacy, whose ρ adds up likewise (Bun and Steinke 2016; as a filter Rogers et al. 2016 and Feldman and
Zrnic 2021); Gaussian noise beside it then counts with ρ = μ²/2.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from isthmus.privacy.analytic import concentrated_epsilon, gaussian_epsilon, gaussian_noise
from isthmus.privacy.events import ALL, Charge, Release

Method = Literal["none", "analytic", "sum", "pld", "rdp"]
STEP = 1e-4
"""Width of the steps in which privacy losses are tabulated (upwards)."""
LARGEST = 60.0
"""Above this epsilon a table of losses has millions of steps, and a record at such an epsilon has no privacy anyway."""
KINDS = 64
"""Different pure epsilons that an account tells apart; beyond that they are rounded up to two digits."""


@dataclass(frozen=True, slots=True)
class Epsilon:
    """An epsilon, an upper bound in any case, and how it was found."""

    value: float
    method: Method
    note: str = ""
    """Why no tighter method was used."""


@dataclass(frozen=True, slots=True)
class Account:
    """The charges of one record (or silo), composed."""

    gaussian: float = 0.0
    pures: tuple[tuple[float, int], ...] = ()
    """Pure epsilons and how often each was charged."""
    concentrated: float = 0.0
    """ρ of noise in whole numbers."""

    def plus(self, charge: Charge) -> Account:
        pures = self.pures
        if charge.pure:
            counted = Counter(dict(self.pures))
            counted[charge.pure] += 1
            pures = tuple(sorted((counted if len(counted) <= KINDS else _coarse(counted)).items()))
        return Account(self.gaussian + charge.gaussian, pures, self.concentrated + charge.concentrated)

    def joined(self, other: Account) -> Account:
        """Both composed."""
        counted = Counter(dict(self.pures)) + Counter(dict(other.pures))
        concentrated = self.concentrated + other.concentrated
        return Account(self.gaussian + other.gaussian, tuple(sorted(counted.items())), concentrated)

    @property
    def bounded(self) -> bool:
        amounts = self.gaussian, self.concentrated, *(pure for pure, _ in self.pures)
        return all(map(math.isfinite, amounts))

    def bound(self, delta: float) -> float:
        """An epsilon at once, the tightest unless metric noise is mixed with other: that of the noise in numbers plus
        the pure sum."""
        return self._noised(delta) + sum(pure * count for pure, count in self.pures)

    def epsilon(self, delta: float) -> Epsilon:
        """The tightest epsilon at this delta."""
        if not self.bounded:
            return Epsilon(math.inf, "none", "a release was not clipped, or not noised")
        if not self.pures:
            return Epsilon(self._noised(delta), "rdp" if self.concentrated else "analytic")
        return min(_mixtures(self, delta), key=lambda found: found.value)

    def within(self, epsilon: float, delta: float) -> bool:
        """Whether no more than ``epsilon`` is spent; at once, where the quick answer decides."""
        if epsilon == math.inf:
            return True
        if not self.pures and not self.concentrated:
            return self.gaussian <= _room(epsilon, delta) * (1 + 1e-9)
        return self.bounded and (
            self.bound(delta) <= epsilon * (1 + 1e-9) or self.epsilon(delta).value <= epsilon * (1 + 1e-9)
        )

    def _noised(self, delta: float) -> float:
        """Epsilon of all but the pure charges."""
        if not self.concentrated:
            return _gaussian(self.gaussian, delta)
        return _concentrated(self.concentrated + self.gaussian / 2, delta)


class Accountant:
    """Keeps the account of each record, of the updates and of the whole silo.

    Args:
        delta: at which epsilons are stated.
    """

    def __init__(self, delta: float, history: Iterable[Release] = ()) -> None:
        self.delta = delta
        self.records: defaultdict[str, Account] = defaultdict(Account)
        self.updates = Account()
        self.silo = Account()
        self._largest = 0.0
        """Of the records' charges of Gaussian noise: these only grow."""
        self._mixed: set[str] = set()
        """Records with charges of metric noise."""
        for release in history:
            self.note(release)

    def note(self, release: Release) -> None:
        for charge in release.charges:
            self.silo = self.silo.plus(charge)
            if charge.record == ALL:
                self.updates = self.updates.plus(charge)
                continue
            self.records[charge.record] = account = self.records[charge.record].plus(charge)
            self._largest = max(self._largest, account.gaussian)
            if account.pures:
                self._mixed.add(charge.record)

    def worst(self) -> Epsilon:
        """Of the record that is worst off; 0 if nothing left."""
        return worst(self.records.values(), self.delta)

    def quick_worst(self) -> float:
        """As ``worst``, at once; more than it where mechanisms are mixed."""
        mixed = (self.records[record].bound(self.delta) for record in self._mixed)
        return max(_gaussian(self._largest, self.delta), max(mixed, default=0.0))

    def median(self) -> float:
        """Of the records that anything left about, by the quick bound; 0 if there is none."""
        found = sorted(account.bound(self.delta) for account in self.records.values())
        return found[len(found) // 2] if found else 0.0


def worst(accounts: Collection[Account], delta: float) -> Epsilon:
    """The largest epsilon among these accounts."""
    found = Epsilon(0.0, "analytic")
    bounds = {account: account.bound(delta) for account in set(accounts)}
    for account in sorted(bounds, key=bounds.__getitem__, reverse=True):
        if bounds[account] <= found.value:
            break
        found = max(found, account.epsilon(delta), key=lambda one: one.value)
    return found


@lru_cache(maxsize=4096)
def _gaussian(charge: float, delta: float) -> float:
    if not charge or not math.isfinite(charge):
        return charge
    return gaussian_epsilon(charge, delta)


@lru_cache(maxsize=4096)
def _concentrated(rho: float, delta: float) -> float:
    return concentrated_epsilon(rho, delta) if math.isfinite(rho) else rho


@lru_cache(maxsize=4096)
def _room(epsilon: float, delta: float) -> float:
    """The largest charge of Gaussian noise that keeps to this epsilon."""
    return gaussian_noise(epsilon, delta) ** -2


def _coarse(pures: Counter[float]) -> Counter[float]:
    coarse: Counter[float] = Counter()
    for pure, count in pures.items():
        unit = 10.0 ** (math.floor(math.log10(pure)) - 1)
        coarse[max(pure, math.ceil(pure / unit) * unit)] += count
    return coarse


@lru_cache(maxsize=1024)
def _mixtures(account: Account, delta: float) -> tuple[Epsilon, ...]:
    """Bounds by several methods: privacy loss distributions, where they can be tabulated, else Rényi's divergences."""
    total = account.bound(delta)
    if total <= LARGEST and not account.concentrated:
        return (_losses(account, delta), Epsilon(total, "sum"))
    why = f"the sum of {total:.3g} is too large to tabulate losses"
    if account.concentrated:
        why = "of noise in whole numbers concentrated privacy is known, not the losses"
    return (_renyi(account, delta, why), Epsilon(total, "sum", why))


def _losses(account: Account, delta: float) -> Epsilon:
    """By privacy loss distributions, rounded up (Koskela et al. 2020; Doroshenko et al. 2022). A pure epsilon's is that
    of randomized response, which dominates every mechanism of that epsilon."""
    from dp_accounting.pld import common, privacy_loss_distribution  # with scipy: see isthmus.privacy.analytic

    composed = privacy_loss_distribution.identity(STEP)
    if account.gaussian:
        composed = composed.compose(
            privacy_loss_distribution.from_gaussian_mechanism(
                account.gaussian**-0.5, value_discretization_interval=STEP
            )
        )
    for pure, count in account.pures:
        parameters = common.DifferentialPrivacyParameters(pure, 0.0)
        one = privacy_loss_distribution.from_privacy_parameters(parameters, STEP)
        composed = composed.compose(one.self_compose(count))
    return Epsilon(float(composed.get_epsilon_for_delta(delta)), "pld")


def _renyi(account: Account, delta: float, why: str) -> Epsilon:
    """By Rényi divergences (Mironov 2017)."""
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    if gaussian := account.gaussian + 2 * account.concentrated:  # ρ bounds the divergences as those of μ² = 2ρ do
        accountant.compose(dp_accounting.GaussianDpEvent(gaussian**-0.5))
    for pure, count in account.pures:
        if pure > 500:
            return Epsilon(math.inf, "rdp", why)
        flips = dp_accounting.RandomizedResponseDpEvent(2 / (1 + math.exp(pure)), 2)
        accountant.compose(flips, count)
    return Epsilon(float(accountant.get_epsilon(delta)), "rdp", why)
