"""What the privacy budgets of a recipe allow, before it runs: how often each record's rows can be trained on.

A pass is one training step with each of a silo's rows. Nothing leaves and nothing is charged.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from isthmus.data.silo_data import SiloData
from isthmus.privacy.accountant import Account
from isthmus.privacy.budget import Budget
from isthmus.privacy.events import Charge
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.join import load_tokenizer, open_records

MOST_PASSES = 100_000
"""Passes beyond which none are counted."""


@dataclass(frozen=True)
class RecordsPlan:
    """Records that have one limit."""

    name: str
    """The sensitivity classes that set it; empty: the recipe's own limit, or none."""
    limit: float
    """Largest epsilon of each; infinite: none."""
    records: int
    epsilon: float
    """Of the record that one pass costs most."""
    fewest: int
    """Passes that the record that costs most can afford, at most ``MOST_PASSES``."""
    median: float
    """Passes that a record in the middle can afford."""
    most: int
    """Passes that the record that costs least can afford."""


@dataclass(frozen=True)
class PrivacyPlan:
    """One silo's plan."""

    silo: str
    rows: int
    passes: float
    """Passes over its rows that the recipe plans."""
    groups: tuple[RecordsPlan, ...]
    """From the smallest limit to the largest."""
    silo_passes: int | None
    """Passes that ``privacy.silo_epsilon`` allows the silo as a whole, without its updates; None: it is not set."""

    @property
    def spent(self) -> bool:
        """Whether rows are to be trained on, and no record can afford a single pass."""
        if not self.passes or not self.rows:
            return False
        return not any(group.most for group in self.groups) or self.silo_passes == 0


def plan_privacy(recipe: Recipe, name: str) -> PrivacyPlan:
    """How often this silo's rows can be trained on.

    Raises:
        IsthmusError: the model's tokenizer or the silo's rows cannot be used.
    """
    recipe = recipe.of_silo(name)
    tokenizer = load_tokenizer(Path(recipe.model.path))
    records = open_records(recipe, tokenizer, None)
    data = SiloData(recipe.party(name), recipe, tokenizer, records.sensitivity)
    records.add_rows(data.known_rows(), data.train, recipe.boundary.tail)
    boundary = Boundary(recipe.boundary, budget=Budget(recipe.privacy), records=records)
    first, limits = _pass(recipe, boundary, data, first=True)
    later = _pass(recipe, boundary, data, first=False)[0] if recipe.boundary.release_once else first
    delta, groups = recipe.privacy.delta, defaultdict[float, list[str]](list)
    for record in first:
        groups[limits.get(record, math.inf)].append(record)
    named = {} if recipe.sensitivity is None else recipe.sensitivity.classes
    plans = []
    for limit, own in sorted(groups.items()):
        counts = sorted(affordable_passes(first[one], later.get(one, Account()), limit, delta) for one in own)
        classes = ", ".join(key for key, section in named.items() if section.epsilon == limit)
        dearest = max(first[one].bound(delta) if first[one].bounded else math.inf for one in own)
        plans.append(RecordsPlan(classes, limit, len(own), dearest, counts[0], median(counts), counts[-1]))
    whole = recipe.privacy.silo_epsilon
    return PrivacyPlan(
        name,
        len(data.train),
        _planned_passes(recipe, data),
        tuple(plans),
        None if whole is None else affordable_passes(_joined(first), _joined(later), whole, delta),
    )


def affordable_passes(first: Account, later: Account, limit: float, delta: float) -> int:
    """How many passes fit a limit, of which the first one costs otherwise than the later ones.

    Args:
        limit: largest epsilon.
        delta: at which it holds.

    Returns:
        At most ``MOST_PASSES``, also where there is no limit.
    """
    beyond = range(1, MOST_PASSES + 1)
    return bisect_left(beyond, True, key=lambda n: not first.joined(later.times(n - 1)).within(limit, delta))


def _pass(
    recipe: Recipe, boundary: Boundary, data: SiloData, *, first: bool
) -> tuple[dict[str, Account], dict[str, float]]:
    """What one pass costs each record, and each record's limit."""
    forwards, gradients = recipe.step_releases
    if recipe.boundary.release_once:
        forwards = 1 if first else 0
    charges: defaultdict[str, list[Charge]] = defaultdict(list)
    limits: dict[str, float] = {}
    for row in data.train:
        costs, subjects = boundary.costs(
            [row.input], [row.crossing(recipe.boundary.tail)], forwards=forwards, gradients=gradients
        )
        for record, limit in boundary.budget.limits(subjects).items():
            limits[record] = min(limit, limits.get(record, math.inf))
        for charge in costs[0]:
            charges[charge.record].append(charge)
    return {record: Account().plus(*own) for record, own in charges.items()}, limits


def _joined(accounts: dict[str, Account]) -> Account:
    whole = Account()
    for one in accounts.values():
        whole = whole.joined(one)
    return whole


def _planned_passes(recipe: Recipe, data: SiloData) -> float:
    """Passes over the silo's rows that the recipe plans."""
    train = recipe.train
    if train.epochs is not None:
        return float(train.epochs) if train.rounds else 0.0
    return train.rounds * recipe.steps(data.name) * train.batch / max(1, len(data.train))
