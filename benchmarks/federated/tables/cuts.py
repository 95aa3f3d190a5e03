"""The tables of cuts and of noise: what silos learn of hutto's sentiment behind each cut, and through which noise.

The federation is the quality table's, with its first draw of rows and its learning rate, and another cut or other
noise, which is met in training and in use. Silos with cuts of their own each answer behind it; the mean is reported.
What a cut costs a silo, and what is read behind it through which noise, is ``make bench-cuts``.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.common.results import Results
from benchmarks.common.rows import Values
from benchmarks.federated.simulation import merged
from benchmarks.federated.tables.cells import Cell, digest, recipe_digest
from benchmarks.federated.tables.quality import (
    FEDERATED,
    PUBLISHED,
    Arms,
    Learning,
    Setting,
    arms_of,
    paired,
    report_gap,
    row_measure,
)
from benchmarks.federated.tables.sets import SILOS
from benchmarks.privacy.cuts import BOTTOMS, noises
from isthmus.engines.cuts import CUTS
from isthmus.recipe import Recipe

TASK = "hutto"
MIXED = ((1, 1), (2, 2), (5, 5))
"""Cuts of one federation's silos, as of a phone, a laptop and a server."""
LAST = 8
"""Steps at the end whose mean loss is reported."""


@dataclass(frozen=True)
class Point:
    """One federation: a cut or one of each silo, and the noise on what crosses."""

    name: str
    cuts: tuple[tuple[int, int], ...]
    noise: float

    @property
    def changes(self) -> Values:
        """Of the recipe's sections: the least cut, and the noise."""
        bottom, top = (min(sides) for sides in zip(*self.cuts, strict=True))
        return {"model": {"bottom": bottom, "top": top}, "boundary": {"forward": {"noise": self.noise}}}

    @property
    def own(self) -> dict[str, Values]:
        """Keys of single silos."""
        if len(self.cuts) == 1:
            return {}
        return {name: {"bottom": cut[0], "top": cut[1]} for name, cut in zip(SILOS, self.cuts, strict=True)}


def cut_points() -> Iterator[Point]:
    """Each cut and the mixed ones, without noise and with the published one."""
    for cuts in (*((cut,) for cut in CUTS), MIXED):
        for name, noise in (("no noise", 0.0), ("published noise", PUBLISHED["boundary"]["forward"]["noise"])):
            yield Point(f"cut {' '.join(map(str, cuts))}, {name}", cuts, noise)


def noise_points(learning: Learning) -> Iterator[Point]:
    """Noise as published and relative to what crosses, behind one, two and three blocks."""
    for bottom in BOTTOMS:
        for name, noise in noises(round(learning.uncut.magnitude(learning.validation, bottom), 3)):
            yield Point(f"bottom {bottom}, {name}", ((bottom, 1),), noise)


def run(setting: Setting) -> None:
    """Measure the cells that are missing, with the rate that costs the pooled model least."""
    with arms_of(setting, TASK) as by_seed:
        first = by_seed[setting.seeds[0]]
        first.measured("pooled")
        for point in (*cut_points(), *noise_points(first.learning)):
            cell_of(first, point).measured(lambda point=point: learned(first, point))


def report(results: Results, setting: Setting) -> None:
    """What the cells that there are say, beside the pooled model."""
    with arms_of(setting, TASK) as by_seed:
        first = by_seed[setting.seeds[0]]
        whole = first.cell("pooled").found()
        if whole is None:
            print("cuts: not measured")
            return
        for point in (*cut_points(), *noise_points(first.learning)):
            found = cell_of(first, point).found()
            if found is None:
                print(f"{point.name}: not measured")
                continue
            report_point(results, point.name, found)
            report_gap(results, f"{point.name}, above pooled", paired({0: found}, {0: whole}), judged=False)


def report_point(results: Results, name: str, found: Values) -> None:
    own = row_measure(tuple(key for key in found if key not in ("rows", "losses")))
    results.add(f"{name}: {own}", 100 * statistics.fmean(found["rows"]), "%")
    losses = found["losses"]
    results.add(f"{name}: loss, step 1", losses[0], "nats")
    for start in range(0, len(losses), LAST):
        some = losses[start : start + LAST]
        results.add(f"{name}: loss, steps {start + 1} to {start + len(some)}", statistics.fmean(some), "nats")


def learned(arms: Arms, point: Point) -> Values:
    """What the silos learn, and answer behind their cuts and through their noise."""
    learning = arms.learning
    together = learning.federated(point.changes, arms.rate("federated"), point.own)
    each = []
    for bottom in dict.fromkeys(cut[0] for cut in point.cuts):
        with learning.uncut.noised(point.noise, bottom, learning.seed):
            each.append(learning.answered(together.tensors))
    means = {key: statistics.fmean(one[key] for one in each) for key in each[0] if key != "rows"}
    rows = [statistics.fmean(row) for row in zip(*(one["rows"] for one in each), strict=True)]
    return {"rows": rows, **means, "losses": together.losses}


def cell_of(arms: Arms, point: Point) -> Cell:
    recipe = recipe_of(arms, point)
    name = re.sub(r"[^\w.]+", "-", point.name)
    sample = arms.learning.sample
    return Cell(f"cuts/{name}", {"recipe": recipe_digest(recipe), "rows": digest([sample.train, sample.reported])})


def recipe_of(arms: Arms, point: Point) -> Recipe:
    rate = {"train": {"learning_rate": arms.rate("federated")}}
    return arms.learning.recipe(merged(merged(FEDERATED, rate), point.changes), point.own)
