"""Points of the frontier: a cut and a boundary each; how large their noise is follows from what crosses at that cut.

Shapes: T tokens, W numbers that cross of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from isthmus.audit.capture import capture_pairs
from isthmus.audit.target import Target
from isthmus.data.tokens import Tokens
from isthmus.privacy.accountant import Accountant
from isthmus.privacy.mechanisms import mechanism_of
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import BoundarySection, Recipe

DELTA = 1e-5
EPOCHS = 4
Kind = Literal["none", "fixed", "clipped", "gaussian", "dp_gaussian", "metric"]
Values = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A place in the space of cuts, shapes and mechanisms."""

    cut: tuple[int, int]
    kind: Kind
    amount: float = 0.0
    """``fixed``: the deviation. ``clipped``: likewise, of vectors clipped to 1.
    ``gaussian``, ``metric``: the deviation of a coordinate over the root mean square of
    what crosses. ``dp_gaussian``: epsilon of one vector."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Of the recipe's boundary: tail, width, residual, gradients."""
    learned: int = 0
    """Steps that the model is tuned through this boundary; else it is tuned uncut and clean, and meets it in use."""

    @property
    def mechanism(self) -> str:
        """As a legend names it."""
        shape = "".join(f", {key} {self.shape[key]}" for key in ("tail", "width") if key in self.shape)
        named = {"none": "no noise", "fixed": "gaussian", "clipped": "gaussian"}.get(self.kind, self.kind)
        return named + shape + (f", learned {self.learned} steps" if self.learned else "")

    @property
    def setting(self) -> str:
        """Strength of the noise."""
        told = {
            "none": "",
            "fixed": f"noise {self.amount:g}",
            "clipped": f"noise {self.amount:g} × clip",
            "dp_gaussian": f"epsilon {self.amount:g} a vector",
        }
        return told.get(self.kind, f"{self.amount:g} × rms")

    @property
    def name(self) -> str:
        return ", ".join(one for one in (f"cut {self.cut}", self.mechanism, self.setting) if one)

    def boundary(self, norms_T: torch.Tensor, width: int) -> Values:
        """The recipe's section, given the norms of what crosses without clip and noise."""
        return {**self.shape, "forward": self._forward(float(norms_T.median()), width)}

    def fixed(self) -> Values:
        """The recipe's section, where it does not depend on what crosses."""
        return {**self.shape, "forward": self._forward(math.nan, 1)}

    def _forward(self, norm: float, width: int) -> Values:
        """Clips, where the mechanism wants one, are the median norm."""
        deviation = self.amount * norm / math.sqrt(width)
        if self.kind == "gaussian":
            return {"noise": deviation}
        if self.kind == "dp_gaussian":
            return {"mechanism": "dp_gaussian", "clip": norm, "epsilon": self.amount, "delta": DELTA}
        if self.kind == "metric":  # a coordinate's variance is (width + 1) / epsilon²
            return {"mechanism": "metric", "clip": norm, "epsilon": math.sqrt(width + 1) / deviation}
        return {"noise": self.amount} | ({"clip": 1.0} if self.kind == "clipped" else {})


def norms(recipe: Recipe, rows: Sequence[Tokens]) -> tuple[torch.Tensor, int]:
    """Of each vector that crosses of the colluder's rows, ``[T]``, and how wide one is."""
    crossed = torch.cat([pair.crossing.hidden_LD.float() for pair in capture_pairs(Target(recipe), "west", rows)])
    return crossed.norm(dim=1), crossed.shape[1]


def epsilon(section: BoundarySection, vectors: int, times: int) -> float:
    """Of a row of which so many vectors cross, so often; infinite where nothing is clipped."""
    subjects, accountant = Subjects(("row",), (vectors,)), Accountant(DELTA)
    for step in range(times):
        accountant.note(mechanism_of(section.forward).event("forward", step, subjects, 0))
    return accountant.worst().value


def narrow(cut: tuple[int, int], width: int, noise: float, steps: int = 40) -> Point:
    """As the shipped private recipe's, but of every token: few clipped and noised numbers, a residual path, no
    gradients."""
    return Point(cut, "clipped", noise, {"width": width, "residual": True, "gradients": False}, learned=steps)


def classification() -> list[Point]:
    """The most telling first."""
    deep, middle, shallow = (8, 8), (4, 4), (1, 1)
    return [
        *(Point(cut, "none") for cut in (shallow, deep)),
        *(Point(cut, "gaussian", 1.0) for cut in (shallow, deep, middle)),
        Point(shallow, "fixed", 0.025),
        narrow(deep, 4, 0.5),
        Point(deep, "gaussian", 0.5),
        Point(deep, "gaussian", 2.0),
        Point(deep, "gaussian", 1.0, {"tail": 1, "residual": True}),
        Point(deep, "dp_gaussian", 64.0),
        Point(deep, "metric", 1.0),
        Point(deep, "gaussian", 1.0, {"tail": 8, "residual": True}),
        Point(deep, "dp_gaussian", 64.0, {"width": 16, "residual": True}),
        Point(deep, "dp_gaussian", 64.0, {"width": 4, "residual": True}),
        Point(middle, "gaussian", 0.5),
        Point(middle, "gaussian", 2.0),
        Point(shallow, "gaussian", 0.5),
        Point(shallow, "gaussian", 2.0),
        Point(deep, "dp_gaussian", 8.0),
        Point(deep, "dp_gaussian", 1.0),
        Point(middle, "metric", 0.5),
        Point(shallow, "dp_gaussian", 64.0),
    ]


def generation() -> list[Point]:
    deep, middle, shallow = (8, 8), (4, 4), (1, 1)
    return [
        Point(shallow, "none"),
        Point(deep, "none"),
        narrow(deep, 4, 0.5),
        narrow(deep, 4, 0.5, 300),
        narrow(deep, 16, 0.1),
        Point(deep, "gaussian", 1.0),
        Point(deep, "gaussian", 0.5),
        Point(shallow, "gaussian", 1.0),
        Point(deep, "metric", 1.0),
        Point(deep, "dp_gaussian", 64.0),
        Point(middle, "gaussian", 0.5),
        Point(deep, "gaussian", 2.0),
        Point(shallow, "fixed", 0.025),
    ]
