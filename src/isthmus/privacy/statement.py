"""The statement: what a silo's ledger says was spent."""

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

NOTHING = Epsilon(0.0, "analytic")


@dataclass(frozen=True)
class PathStatement:
    """What left on one path."""

    releases: int
    bytes: int
    mechanisms: tuple[str, ...]
    """Each as it was used, with clip and noise."""
    worst: Epsilon
    """Of the worst record; of an update, of the silo."""
    median: float | None
    """Of the median record; None for updates."""


@dataclass(frozen=True)
class Statement:
    """What left a silo, and at what cost. Epsilons are upper bounds at ``delta``."""

    silo: str
    delta: float
    verified: bool
    """Whether the ledger holds together; if not, nothing else is told but why."""
    reason: str = ""
    records: int = 0
    paths: dict[str, PathStatement] = field(default_factory=dict)
    worst: Epsilon = NOTHING
    """Of the worst record's own hidden states and gradients: the silo's figure, since records are disjoint."""
    median: float = 0.0
    with_updates: Epsilon = NOTHING
    """Of the worst record if every update is charged to it as well."""
    whole: Epsilon = NOTHING
    """Of everything that left, composed as if it were about one record."""
    record_budget: float | None = None
    silo_budget: float | None = None

    @property
    def record_left(self) -> float | None:
        """Of the budget of the worst record; None without a budget."""
        return _left(self.record_budget, self.worst)

    @property
    def silo_left(self) -> float | None:
        return _left(self.silo_budget, self.whole)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: an epsilon without a bound is null."""
        told = asdict(self) | {"record_left": self.record_left, "silo_left": self.silo_left}
        return {key: _finite(value) for key, value in told.items()}


def read_statement(path: Path, silo: str, section: PrivacySection) -> Statement:
    """The statement of the ledger at this path; of a silo that has none yet, an empty one."""
    try:
        releases = list(read_ledger(path).releases())
    except LedgerError as error:
        return Statement(silo, section.delta, verified=False, reason=error.message)
    accountant = Accountant(section.delta, releases)
    by_path: defaultdict[str, list[Release]] = defaultdict(list)
    for release in releases:
        by_path[release.path].append(release)
    updates = accountant.updates
    return Statement(
        silo,
        section.delta,
        verified=True,
        records=len(accountant.records),
        paths={path: _of_path(by_path[path], section.delta) for path in get_args(events.Path) if path in by_path},
        worst=accountant.worst(),
        median=accountant.median(),
        with_updates=worst([one.joined(updates) for one in accountant.records.values()] or [updates], section.delta),
        whole=accountant.silo.epsilon(section.delta),
        record_budget=section.record_epsilon,
        silo_budget=section.silo_epsilon,
    )


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
    """One for each way that they were noised; a clip that moved from round to round is told with its ends."""
    summed: defaultdict[int, list[Release]] = defaultdict(list)
    told = []
    for release in releases:
        if release.mechanism == "summed":
            summed[release.honest].append(release)
        else:
            told.append(_described(release))
    told += [_described(end) for ones in summed.values() for end in (_least(ones), _most(ones))]
    return tuple(dict.fromkeys(told))


def _least(releases: list[Release]) -> Release:
    return min(releases, key=lambda release: release.clip)


def _most(releases: list[Release]) -> Release:
    return max(releases, key=lambda release: release.clip)


def _described(release: Release) -> str:
    clip = f"clip {release.clip:.3g}" if release.clip else "no clip"
    noise = f"noise {release.noise:.3g}" if release.noise else "no noise"
    unit = f" a {release.unit}" if release.mechanism == "dp_gaussian" else ""
    silos = f" in a sum with {release.honest} honest silos" if release.honest > 1 else ""
    return f"{release.mechanism}{unit}, {clip}, {noise}{silos}"


def _left(budget: float | None, spent: Epsilon) -> float | None:
    return None if budget is None else max(0.0, budget - spent.value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
