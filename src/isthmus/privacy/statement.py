"""The statement: what a silo released and what it cost, computed from its ledger."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from isthmus.errors import LedgerError
from isthmus.privacy import events
from isthmus.privacy.accountant import Accountant, Epsilon, worst
from isthmus.privacy.events import Release
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import PrivacySection

ZERO = Epsilon(0.0, "analytic")


@dataclass(frozen=True)
class PathStatement:
    """The releases of one path: forward, gradient, update or norm."""

    releases: int
    bytes: int
    mechanisms: tuple[str, ...]
    """A description of each mechanism used, with clip and noise."""
    worst: Epsilon
    """Epsilon of the worst record; for updates, of the silo."""
    median: float | None
    """Epsilon of the median record; None for updates."""


@dataclass(frozen=True)
class Statement:
    """The releases of one silo and their cost. Epsilons are upper bounds at ``delta``."""

    silo: str
    delta: float
    verified: bool
    """Whether the ledger's chain of hashes is intact. If not, only ``reason`` is set."""
    reason: str = ""
    """Why the ledger was not verified; empty if it was."""
    records: int = 0
    """Number of records of which anything was released."""
    paths: dict[str, PathStatement] = field(default_factory=dict)
    """Of training and use, by path."""
    evaluations: dict[str, PathStatement] = field(default_factory=dict)
    """Of evaluations, by path. A record that both read has both charges in the figures below."""
    evaluated_records: int = 0
    """Number of the records that evaluations read."""
    worst: Epsilon = ZERO
    """Epsilon of the worst record's own hidden states and gradients. It is the silo's figure: records are disjoint."""
    median: float = 0.0
    """Epsilon of the median record's own hidden states and gradients."""
    with_updates: Epsilon = ZERO
    """Epsilon of the worst record with all updates charged to it too."""
    whole: Epsilon = ZERO
    """Epsilon of all releases composed as if they concerned one record."""
    record_budget: float | None = None
    """Largest epsilon that the recipe allows a record; None: no limit."""
    silo_budget: float | None = None
    """Largest epsilon that the recipe allows the silo; None: no limit."""

    @property
    def record_left(self) -> float | None:
        """Epsilon left to the worst record; None without a budget."""
        return _left(self.record_budget, self.worst)

    @property
    def silo_left(self) -> float | None:
        """Epsilon left to the silo; None without a budget."""
        return _left(self.silo_budget, self.whole)

    def to_dict(self) -> dict[str, Any]:
        """The statement for JSON; an infinite epsilon is null."""
        values = asdict(self) | {"record_left": self.record_left, "silo_left": self.silo_left}
        return {key: _finite(value) for key, value in values.items()}


def read_statement(path: Path, silo: str, section: PrivacySection) -> Statement:
    """The statement of the ledger at this path; an empty one if there is no ledger yet."""
    try:
        releases = list(read_ledger(path).releases())
    except LedgerError as error:
        return Statement(silo, section.delta, verified=False, reason=error.message)
    accountant = Accountant(section.delta, releases)
    measured = [release for release in releases if release.evaluation]
    updates = accountant.updates
    return Statement(
        silo,
        section.delta,
        verified=True,
        records=len(accountant.records),
        paths=_by_path([release for release in releases if not release.evaluation], section.delta),
        evaluations=_by_path(measured, section.delta),
        evaluated_records=len(Accountant(section.delta, measured).records),
        worst=accountant.worst(),
        median=accountant.median(),
        with_updates=worst([one.joined(updates) for one in accountant.records.values()] or [updates], section.delta),
        whole=accountant.silo.epsilon(section.delta),
        record_budget=section.record_epsilon,
        silo_budget=section.silo_epsilon,
    )


def _by_path(releases: list[Release], delta: float) -> dict[str, PathStatement]:
    found: defaultdict[str, list[Release]] = defaultdict(list)
    for release in releases:
        found[release.path].append(release)
    return {path: _of_path(found[path], delta) for path in get_args(events.Path) if path in found}


def _of_path(releases: list[Release], delta: float) -> PathStatement:
    accountant = Accountant(delta, releases)
    update = releases[0].path in ("update", "norm")
    return PathStatement(
        len(releases),
        sum(release.size for release in releases),
        _descriptions(releases),
        accountant.updates.epsilon(delta) if update else accountant.worst(),
        None if update else accountant.median(),
    )


def _descriptions(releases: list[Release]) -> tuple[str, ...]:
    """A description of each distinct mechanism. ``summed`` ones, whose clip may change every round, are given by their
    smallest and largest clip."""
    summed: defaultdict[int, list[Release]] = defaultdict(list)
    found = []
    for release in releases:
        if release.mechanism == "summed":
            summed[release.honest].append(release)
        else:
            found.append(_described(release))
    found += [_described(one) for group in summed.values() for one in (_smallest_clip(group), _largest_clip(group))]
    return tuple(dict.fromkeys(found))


def _smallest_clip(releases: list[Release]) -> Release:
    return min(releases, key=lambda release: release.clip)


def _largest_clip(releases: list[Release]) -> Release:
    return max(releases, key=lambda release: release.clip)


def _described(release: Release) -> str:
    clip = f"clip {release.clip:.3g}" if release.clip else "no clip"
    noise = f"noise {release.noise:.3g}" if release.noise else "no noise"
    unit = f" a {release.unit}" if release.mechanism == "dp_gaussian" else ""
    silos = f" in a sum with {release.honest} honest silos" if release.honest > 1 else ""
    if release.summed:
        honest = f", {release.honest} of them honest" if release.honest else ""
        silos = f" in masked sums of {release.summed} silos or more{honest}"
    return f"{release.mechanism}{unit}, {clip}, {noise}{silos}"


def _left(budget: float | None, spent: Epsilon) -> float | None:
    return None if budget is None else max(0.0, budget - spent.value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
