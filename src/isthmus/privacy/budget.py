"""The budget: what may still leave, asked before anything does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from isthmus.errors import BudgetExhausted
from isthmus.privacy.accountant import Account, Accountant
from isthmus.privacy.events import ALL, Charge, Release
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import PrivacySection

NAMED = 5
"""Records that an error names."""


class Budget:
    """Limits on what records, and the silo, are charged.

    Args:
        section: the limits, and the delta of all epsilons.
        history: what left before.
    """

    def __init__(self, section: PrivacySection | None = None, history: Iterable[Release] = ()) -> None:
        section = section or PrivacySection()
        self.delta = section.delta
        self.accountant = Accountant(section.delta, history)
        self._record = math.inf if section.record_epsilon is None else section.record_epsilon
        self._silo = math.inf if section.silo_epsilon is None else section.silo_epsilon
        self.limited = self._record < math.inf or self._silo < math.inf
        """Whether the recipe limits what a record or the silo is charged. Classes of text may have limits besides."""

    @property
    def epsilon(self) -> float:
        """Of the worst record so far; at most a little more than it is, where mechanisms are mixed."""
        return self.accountant.quick_worst()

    def require(self, event: Release, subjects: Subjects) -> None:
        """Raise if this release would cost more than there is.

        Raises:
            BudgetExhausted: it names the records whose budget is spent; nothing is charged.
        """
        limits = self._limits(subjects)
        spent = [charge.record for charge in event.charges if not self._within(charge, limits)]
        if spent:
            names = ", ".join(spent[:NAMED]) + (f" and {len(spent) - NAMED} more" if len(spent) > NAMED else "")
            raise BudgetExhausted(
                f"the privacy budget does not bear another {event.path} release of record {names}",
                remedy="leave these records out, or agree on a larger privacy.record_epsilon"
                + (" (or epsilon of a class in sensitivity.classes)" if subjects.budgets is not None else ""),
            )
        if not self._silo_bears(event.charges, self.accountant.silo):
            raise BudgetExhausted(
                f"the silo's privacy budget does not bear another {event.path} release",
                remedy="end here, or agree on a larger privacy.silo_epsilon",
            )

    def note(self, event: Release) -> None:
        """Charge for a release."""
        self.accountant.note(event)

    def affordable(self, costs: Sequence[Sequence[Charge]], subjects: Subjects) -> list[bool]:
        """For each sequence, whether all its charges can be borne, those of affordable ones before it included.

        Args:
            costs: of each sequence, its charges for all it is to send.
        """
        if not self.limited and subjects.budgets is None:
            return [True] * len(costs)
        limits, told = self._limits(subjects), []
        records: dict[str, Account] = {}
        silo = self.accountant.silo
        for charges in costs:
            before = {charge.record: records.get(charge.record, self._account(charge.record)) for charge in charges}
            after = dict(before)
            for charge in charges:
                after[charge.record] = after[charge.record].plus(charge)
            bears = self._silo_bears(charges, silo) and all(
                account.within(limits.get(record, math.inf), self.delta) for record, account in after.items()
            )
            told.append(bears)
            if bears:
                records |= after
                silo = silo.plus(*charges)
        return told

    def _limits(self, subjects: Subjects) -> dict[str, float]:
        """Of each record. Updates, which are about none by itself, are bounded by the silo's budget alone."""
        limits: dict[str, float] = {}
        budgets = subjects.budgets or (math.inf,) * len(subjects.records)
        for record, budget in zip(subjects.records, budgets, strict=True):
            if record != ALL:
                limits[record] = min(self._record, budget, limits.get(record, math.inf))
        return limits

    def _within(self, charge: Charge, limits: dict[str, float]) -> bool:
        limit = limits.get(charge.record, math.inf)
        return self._account(charge.record).plus(charge).within(limit, self.delta)

    def _silo_bears(self, charges: Iterable[Charge], silo: Account) -> bool:
        if self._silo == math.inf:
            return True
        return silo.plus(*charges).within(self._silo, self.delta)

    def _account(self, record: str) -> Account:
        return self.accountant.records.get(record, Account())
