"""Robust rules as slowly and obviously as they can be written: loops over plain numbers.

Shapes: N contributions, P parameters; a list of N lists of P numbers stands for all changes.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

Vector = list[float]
Oracle = Callable[[list[Vector], Vector, int], Vector]


def distance(a: Vector, b: Vector) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def mean(changes: list[Vector], weights: Vector | None = None) -> Vector:
    weights = weights or [1.0] * len(changes)
    pairs = [list(zip(weights, values, strict=True)) for values in zip(*changes, strict=True)]
    return [sum(weight * value for weight, value in pair) / sum(weights) for pair in pairs]


def shorten(length: float, radius: float) -> float:
    return 1.0 if length <= radius else radius / length


def plain_mean(changes: list[Vector], weights: Vector, faults: int) -> Vector:
    return mean(changes, weights)


def norm_bound(changes: list[Vector], weights: Vector, faults: int) -> Vector:
    zero = [0.0] * len(changes[0])
    radius = statistics.median(distance(change, zero) for change in changes)
    shortened = [[value * shorten(distance(change, zero), radius) for value in change] for change in changes]
    return mean(shortened, weights)


def median(changes: list[Vector], weights: Vector, faults: int) -> Vector:
    """Of all points where the weighted sum of distances is least the middle one; the ends are values themselves."""

    def one(values: tuple[float, ...]) -> float:
        costs = [sum(weight * abs(value - at) for weight, value in zip(weights, values, strict=True)) for at in values]
        best = [at for at, cost in zip(values, costs, strict=True) if cost <= min(costs) * (1 + 1e-12)]
        return (min(best) + max(best)) / 2

    return [one(values) for values in zip(*changes, strict=True)]


def trimmed_mean(changes: list[Vector], weights: Vector, faults: int) -> Vector:
    return [statistics.fmean(sorted(values)[faults : len(values) - faults]) for values in zip(*changes, strict=True)]


def ranking(changes: list[Vector], faults: int) -> list[int]:
    """The changes' numbers, Krum's first choice first."""

    def score(number: int) -> float:
        others = [distance(changes[number], other) ** 2 for place, other in enumerate(changes) if place != number]
        return sum(sorted(others)[: max(2, len(changes) - faults - 2)])

    return sorted(range(len(changes)), key=score)


def krum(changes: list[Vector], weights: Vector, faults: int) -> Vector:
    return changes[ranking(changes, faults)[0]]


def multi_krum(changes: list[Vector], weights: Vector, faults: int) -> Vector:
    return mean([changes[number] for number in ranking(changes, faults)[: len(changes) - faults]])


def bulyan(changes: list[Vector], weights: Vector, faults: int) -> Vector:
    left, chosen = list(changes), list[Vector]()
    for _ in range(len(changes) - 2 * faults):
        chosen.append(left.pop(ranking(left, faults)[0]))

    def one(values: tuple[float, ...]) -> float:
        middle = statistics.median(values)
        return statistics.fmean(sorted(values, key=lambda value: abs(value - middle))[: len(values) - 2 * faults])

    return [one(values) for values in zip(*chosen, strict=True)]


def spread(changes: list[Vector], weights: Vector, point: Vector) -> float:
    return sum(weight * distance(change, point) for weight, change in zip(weights, changes, strict=True))


def geometric_median(changes: list[Vector], weights: Vector, faults: int) -> Vector:
    """The best of all changes, and of what a general minimizer finds from each of them."""
    found = [
        minimize(lambda point: spread(changes, weights, list(point)), start, method="Nelder-Mead").x.tolist()
        for start in map(np.array, changes)
    ]
    return min([*changes, *found], key=lambda point: spread(changes, weights, point))


def centered_clipping(changes: list[Vector], weights: Vector, faults: int) -> Vector:
    point = [0.0] * len(changes[0])
    for _ in range(5):
        radius = statistics.median(distance(change, point) for change in changes)
        for change, weight, start in zip(changes, weights, itertools.repeat(point)):
            scale = weight * shorten(distance(change, start), radius)
            point = [at + scale * (value - begun) for at, value, begun in zip(point, change, start, strict=True)]
    return point


def fltrust(changes: list[Vector], weights: Vector, faults: int) -> Vector:
    trusted, zero = changes[0], [0.0] * len(changes[0])
    length = distance(trusted, zero)
    products = [sum(x * y for x, y in zip(change, trusted, strict=True)) for change in changes]
    norms = [distance(change, zero) for change in changes]
    trust = [max(0.0, product / norm / length) for product, norm in zip(products, norms, strict=True)]
    scaled = [[value * length / norm for value in change] for change, norm in zip(changes, norms, strict=True)]
    return mean(scaled, trust)


def mixed(changes: list[Vector], faults: int) -> list[Vector]:
    def near(change: Vector) -> list[Vector]:
        return sorted(changes, key=lambda other: distance(change, other))[: len(changes) - faults]

    return [mean(near(change)) for change in changes]


ORACLES: dict[str, Oracle] = {
    "mean": plain_mean,
    "norm-bound": norm_bound,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
    "bulyan": bulyan,
    "geometric-median": geometric_median,
    "centered-clipping": centered_clipping,
    "fltrust": fltrust,
}
