"""The accountant: composes the charges of releases into epsilons.

A *record's* epsilon composes all releases of that record's own vectors: hidden states and gradients, by whatever unit
they were clipped. Records are disjoint, so their epsilons do not add up over a silo; the silo's figure is that of its
*worst record* (parallel composition). It covers what a record's vectors reveal, all else given. The adapters of bottom
and top carry traces of other records into those vectors (into gradients only, where bottom is frozen), and an update
concerns all records at once. Both are covered by the *silo's sum*: all releases, updates included, composed as if they
concerned one record. That is the epsilon of the silo's whole text and an upper bound for any part of it.

Charges follow from lengths and factors, never from values, and later releases may depend on earlier ones: Gaussian
charges compose adaptively by adding μ² (Dong, Roth and Su 2022), and stopping a record when its sum is reached is a
privacy filter (Koskela, Tobaben and Honkela 2022; for individual records Feldman and Zrnic 2021). Discrete Gaussian
noise is charged in zero-concentrated privacy, whose ρ adds up too (Bun and Steinke 2016; as a filter Rogers et al. 2016
and Feldman and Zrnic 2021); Gaussian noise composed with it counts as ρ = μ²/2.
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
LOSS_INTERVAL = 1e-4
"""Discretization interval of privacy loss distributions; losses are rounded up to a multiple of it."""
LARGEST_TABULATED = 60.0
"""Largest epsilon for which loss distributions are tabulated. Above it a table has millions of entries, and a record
with such an epsilon has no privacy anyway."""
DISTINCT_PURE = 64
"""Number of distinct pure epsilons that an account keeps; with more, they are rounded up to two digits."""


@dataclass(frozen=True, slots=True)
class Epsilon:
    """An upper bound of an epsilon, and the method that computed it."""

    value: float
    method: Method
    note: str = ""
    """The reason why no tighter method was used; empty if there is none."""


@dataclass(frozen=True, slots=True)
class Account:
    """The composed charges of one record, or of a silo."""

    gaussian: float = 0.0
    """Sum of the charges of Gaussian noise (μ²)."""
    pures: tuple[tuple[float, int], ...] = ()
    """Each pure epsilon with the number of times it was charged, in increasing order."""
    concentrated: float = 0.0
    """Sum of the charges of discrete Gaussian noise (ρ)."""

    def plus(self, *charges: Charge) -> Account:
        """The account with these charges, too."""
        gaussian, pures, concentrated = self.gaussian, self.pures, self.concentrated
        for charge in charges:
            gaussian, concentrated = gaussian + charge.gaussian, concentrated + charge.concentrated
            if charge.pure:
                counted = Counter(dict(pures))
                counted[charge.pure] += 1
                pures = tuple(sorted((counted if len(counted) <= DISTINCT_PURE else _coarse(counted)).items()))
        return Account(gaussian, pures, concentrated)

    def joined(self, other: Account) -> Account:
        """The composition of both accounts."""
        counted = Counter(dict(self.pures)) + Counter(dict(other.pures))
        concentrated = self.concentrated + other.concentrated
        return Account(self.gaussian + other.gaussian, tuple(sorted(counted.items())), concentrated)

    def times(self, count: int) -> Account:
        """So many compositions of the account with itself."""
        pures = tuple((pure, count * often) for pure, often in self.pures) if count else ()
        return Account(count * self.gaussian, pures, count * self.concentrated)

    @property
    def bounded(self) -> bool:
        """Whether all charges are finite."""
        amounts = self.gaussian, self.concentrated, *(pure for pure, _ in self.pures)
        return all(map(math.isfinite, amounts))

    def bound(self, delta: float) -> float:
        """An upper bound of the epsilon that is cheap to compute: that of the Gaussian charges plus the sum of the pure
        ones. It is the tightest bound unless metric noise is mixed with other noise."""
        return self._additive(delta) + sum(pure * count for pure, count in self.pures)

    def epsilon(self, delta: float) -> Epsilon:
        """The tightest known epsilon at this delta."""
        if not self.bounded:
            return Epsilon(math.inf, "none", "a release was not clipped, or not noised")
        if not self.pures:
            return Epsilon(self._additive(delta), "rdp" if self.concentrated else "analytic")
        return min(_mixtures(self, delta), key=lambda found: found.value)

    def within(self, epsilon: float, delta: float) -> bool:
        """Whether the account's epsilon is at most this one. Cheap where ``bound`` decides."""
        if epsilon == math.inf:
            return True
        if not self.pures and not self.concentrated:
            return self.gaussian <= _largest_charge(epsilon, delta) * (1 + 1e-9)
        return self.bounded and (
            self.bound(delta) <= epsilon * (1 + 1e-9) or self.epsilon(delta).value <= epsilon * (1 + 1e-9)
        )

    def _additive(self, delta: float) -> float:
        """The epsilon of all charges but the pure ones."""
        if not self.concentrated:
            return _gaussian(self.gaussian, delta)
        return _concentrated(self.concentrated + self.gaussian / 2, delta)


class Accountant:
    """The accounts of each record, of the updates and of the whole silo.

    Args:
        delta: the delta of all epsilons.
        history: earlier releases, which are charged at once.
    """

    def __init__(self, delta: float, history: Iterable[Release] = ()) -> None:
        self.delta = delta
        self.records: defaultdict[str, Account] = defaultdict(Account)
        self.updates = Account()
        self.silo = Account()
        self._largest = 0.0
        """Largest Gaussian charge of any record; charges only grow."""
        self._mixed: set[str] = set()
        """Names of records with charges of metric noise."""
        for release in history:
            self.note(release)

    def note(self, release: Release) -> None:
        """Charge a release to its records and the silo."""
        self.silo = self.silo.plus(*release.charges)
        for charge in release.charges:
            if charge.record == ALL:
                self.updates = self.updates.plus(charge)
                continue
            self.records[charge.record] = account = self.records[charge.record].plus(charge)
            self._largest = max(self._largest, account.gaussian)
            if account.pures:
                self._mixed.add(charge.record)

    def worst(self) -> Epsilon:
        """The largest epsilon of any record; 0 if nothing was released."""
        return worst(self.records.values(), self.delta)

    def quick_worst(self) -> float:
        """An upper bound of ``worst`` that is cheap to compute, and equal to it unless a record mixes mechanisms."""
        mixed = (self.records[record].bound(self.delta) for record in self._mixed)
        return max(_gaussian(self._largest, self.delta), max(mixed, default=0.0))

    def median(self) -> float:
        """The median over the records' ``Account.bound``; 0 if nothing was released."""
        found = sorted(account.bound(self.delta) for account in self.records.values())
        return found[len(found) // 2] if found else 0.0


def worst(accounts: Collection[Account], delta: float) -> Epsilon:
    """The largest epsilon of these accounts; 0 if there are none."""
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
def _largest_charge(epsilon: float, delta: float) -> float:
    """The largest charge of Gaussian noise whose epsilon is at most this one."""
    return gaussian_noise(epsilon, delta) ** -2


def _coarse(pures: Counter[float]) -> Counter[float]:
    """The counts with each pure epsilon rounded up to two digits."""
    coarse: Counter[float] = Counter()
    for pure, count in pures.items():
        unit = 10.0 ** (math.floor(math.log10(pure)) - 1)
        coarse[max(pure, math.ceil(pure / unit) * unit)] += count
    return coarse


@lru_cache(maxsize=1024)
def _mixtures(account: Account, delta: float) -> tuple[Epsilon, ...]:
    """Bounds of mixed charges: by privacy loss distributions if these can be tabulated, else by Rényi; and by the
    sum."""
    total = account.bound(delta)
    if total <= LARGEST_TABULATED and not account.concentrated:
        return (_losses(account, delta), Epsilon(total, "sum"))
    why = f"the sum of {total:.3g} is too large for a table of privacy losses"
    if account.concentrated:
        why = "discrete Gaussian noise is known by its concentrated privacy only, not by its loss distribution"
    return (_renyi(account, delta, why), Epsilon(total, "sum", why))


def _losses(account: Account, delta: float) -> Epsilon:
    """An epsilon by privacy loss distributions, rounded up (Koskela et al. 2020; Doroshenko et al. 2022). A pure
    epsilon counts as randomized response, which dominates every mechanism of that epsilon."""
    from dp_accounting.pld import common, privacy_loss_distribution  # with scipy: see isthmus.privacy.analytic

    composed = privacy_loss_distribution.identity(LOSS_INTERVAL)
    if account.gaussian:
        composed = composed.compose(
            privacy_loss_distribution.from_gaussian_mechanism(
                account.gaussian**-0.5, value_discretization_interval=LOSS_INTERVAL
            )
        )
    for pure, count in account.pures:
        parameters = common.DifferentialPrivacyParameters(pure, 0.0)
        one = privacy_loss_distribution.from_privacy_parameters(parameters, LOSS_INTERVAL)
        composed = composed.compose(one.self_compose(count))
    return Epsilon(float(composed.get_epsilon_for_delta(delta)), "pld")


def _renyi(account: Account, delta: float, why: str) -> Epsilon:
    """An epsilon by Rényi divergences (Mironov 2017)."""
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    if gaussian := account.gaussian + 2 * account.concentrated:  # ρ bounds the same divergences as μ² = 2ρ
        accountant.compose(dp_accounting.GaussianDpEvent(gaussian**-0.5))
    for pure, count in account.pures:
        if pure > 500:
            return Epsilon(math.inf, "rdp", why)
        flips = dp_accounting.RandomizedResponseDpEvent(2 / (1 + math.exp(pure)), 2)
        accountant.compose(flips, count)
    return Epsilon(float(accountant.get_epsilon(delta)), "rdp", why)
