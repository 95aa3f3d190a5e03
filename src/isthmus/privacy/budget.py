"""The privacy budget, checked before each release."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from isthmus.errors import BudgetExhausted
from isthmus.privacy.accountant import Account, Accountant
from isthmus.privacy.events import ALL, Charge, Release
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import PrivacySection

MAX_NAMED = 5
"""Largest number of records that an error names."""


class Budget:
    """Limits on the privacy loss of records and of the silo.

    Args:
        section: the limits and the delta of all epsilons; None: no limits.
        history: earlier releases, which are charged.
    """

    def __init__(self, section: PrivacySection | None = None, history: Iterable[Release] = ()) -> None:
        section = section or PrivacySection()
        self.delta = section.delta
        """The delta of all epsilons."""
        self.accountant = Accountant(section.delta)
        self.evaluations = Accountant(section.delta)
        """What evaluations alone have cost; ``accountant`` has all."""
        for release in history:
            self.note(release)
        self._record = math.inf if section.record_epsilon is None else section.record_epsilon
        self._silo = math.inf if section.silo_epsilon is None else section.silo_epsilon
        self.limited = self._record < math.inf or self._silo < math.inf
        """Whether the recipe has a budget for records or the silo. Sensitivity classes may set further budgets."""

    @property
    def epsilon(self) -> float:
        """Epsilon of the record with the largest loss so far; an upper bound, slightly larger with mixed mechanisms."""
        return self.accountant.quick_worst()

    def require(self, event: Release, subjects: Subjects) -> None:
        """Check that a release fits the budgets. Nothing is charged.

        Args:
            subjects: the records that the release belongs to, with their own budgets.

        Raises:
            BudgetExhausted: the budget of a record, which the error names, or of the silo does not allow the release.
        """
        limits = self.limits(subjects)
        spent = [charge.record for charge in event.charges if not self._fits(charge, limits)]
        if spent:
            names = ", ".join(spent[:MAX_NAMED]) + (
                f" and {len(spent) - MAX_NAMED} more" if len(spent) > MAX_NAMED else ""
            )
            raise BudgetExhausted(
                f"the privacy budget does not allow another {event.path} release of record {names}",
                remedy="remove the rows of these records, or agree with all silos on a larger privacy.record_epsilon"
                + (" (or epsilon of a class in sensitivity.classes)" if subjects.budgets is not None else ""),
            )
        if not self._silo_allows(event.charges, self.accountant.silo):
            raise BudgetExhausted(
                f"the silo's privacy budget does not allow another {event.path} release",
                remedy="stop here, or agree with all silos on a larger privacy.silo_epsilon",
            )

    def note(self, event: Release) -> None:
        """Charge a release to its records and the silo."""
        self.accountant.note(event)
        if event.evaluation:
            self.evaluations.note(event)

    def affordable(self, costs: Sequence[Sequence[Charge]], subjects: Subjects) -> list[bool]:
        """For each sequence, whether the budgets allow all its charges after those of the allowed ones before it.

        Args:
            costs: the charges of each sequence, for all its planned releases.
            subjects: the records that the sequences belong to.
        """
        if not self.limited and subjects.budgets is None:
            return [True] * len(costs)
        limits, allowed = self.limits(subjects), []
        records: dict[str, Account] = {}
        silo = self.accountant.silo
        for charges in costs:
            before = {charge.record: records.get(charge.record, self._account(charge.record)) for charge in charges}
            after = dict(before)
            for charge in charges:
                after[charge.record] = after[charge.record].plus(charge)
            fits = self._silo_allows(charges, silo) and all(
                account.within(limits.get(record, math.inf), self.delta) for record, account in after.items()
            )
            allowed.append(fits)
            if fits:
                records |= after
                silo = silo.plus(*charges)
        return allowed

    def limits(self, subjects: Subjects) -> dict[str, float]:
        """The largest epsilon of each record. Updates belong to all records: only the silo's budget limits them."""
        limits: dict[str, float] = {}
        budgets = subjects.budgets or (math.inf,) * len(subjects.records)
        for record, budget in zip(subjects.records, budgets, strict=True):
            if record != ALL:
                limits[record] = min(self._record, budget, limits.get(record, math.inf))
        return limits

    def _fits(self, charge: Charge, limits: dict[str, float]) -> bool:
        limit = limits.get(charge.record, math.inf)
        return self._account(charge.record).plus(charge).within(limit, self.delta)

    def _silo_allows(self, charges: Iterable[Charge], silo: Account) -> bool:
        if self._silo == math.inf:
            return True
        return silo.plus(*charges).within(self._silo, self.delta)

    def _account(self, record: str) -> Account:
        return self.accountant.records.get(record, Account())
