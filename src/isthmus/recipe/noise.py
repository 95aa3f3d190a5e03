"""The recipe's sections on noise that is drawn once for many silos, and on the clip that it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Chance, Positive, Section

if TYPE_CHECKING:
    from isthmus.recipe.recipe import Recipe
    from isthmus.recipe.sections import FederationSection

UNTOUCHED = 0.0, 1e-4
"""``boundary.update.noise`` where a recipe says nothing of it, or that there is none."""


SHORTEST, LONGEST = 1e-12, 1e12
"""Norms in between are clips: their steps are still numbers of 32 bits."""


class NoiseSection(Section):
    """How a round's sum of updates is noised; left out: by what each silo's boundary adds, and nothing else."""

    where: Literal["silos", "root"] = "silos"
    """Each silo adds a share under masks, so that nobody sees a sum with less; or the root, which is then trusted with
    what it sees (updates, or under masks their sum), adds all of it before anybody else sees the mean."""
    multiplier: Positive | None = None
    """Deviation of the sum's noise in every round, in clips; rounding is made up for with a little more."""
    epsilon: Positive | None = None
    """In place of ``multiplier``: of all the recipe's rounds together, at ``privacy.delta``."""
    colluding: Annotated[int, Field(ge=0)] = 0
    """silos: how many may tell the root or edge what they drew; the others' noise is enough without theirs."""

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.multiplier is None) == (self.epsilon is None):
            raise ValueError("federation.noise: its size is given once; set either multiplier or epsilon")
        if self.where == "root" and self.colluding:
            raise ValueError("federation.noise.colluding: the root draws alone; leave colluding out")
        return self


class ClipSection(Section):
    """The L2 norm to which noise in sums is measured."""

    norm: Annotated[float, Field(ge=SHORTEST, le=LONGEST)]
    """Largest norm of a silo's update, of the numbers that cross; with ``quantile`` in the first round."""
    quantile: Chance | None = None
    """Share of the updates that the clip is to leave as they are: it follows from round to round (Andrew et al. 2021).
    Left out: it stays."""
    rate: Positive = 0.2
    """quantile: how far it follows; the clip changes by a factor of at most exp(rate) a round."""
    norms: Chance = 0.1
    """quantile: part of a round's privacy that goes to the silos' word whether the clip changed their update."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        fields = ClipSection.model_fields
        for name in ("rate", "norms"):
            if self.quantile is None and getattr(self, name) != fields[name].default:
                raise ValueError(f"federation.clip.{name}: a clip that stays has none; leave it out, or add quantile")
        return self


def check_noise(recipe: Recipe) -> None:
    """Raise ``ValueError``, reason and remedy, if the noise of sums would not be what the recipe promises."""
    federation = recipe.federation
    if (federation.noise is None) != (federation.clip is None):
        has, lacks = ("clip", "noise") if federation.noise is None else ("noise", "clip")
        raise ValueError(
            f"federation.{lacks}: noise is measured by a clip, and a clip alone hides nothing; "
            f"add federation.{lacks}, or leave federation.{has} out"
        )
    if federation.noise is None:
        return
    _check_influence(federation)
    if federation.noise.where == "root":
        _check_root(recipe)
    if federation.masks:
        _check_silos(recipe)
    elif federation.noise.where == "silos":
        raise ValueError(
            "federation.noise: without masks the root sees each update, with less noise than the sum is to have; "
            "set masks = true, or have each silo add all of it with boundary.update"
        )


def _check_influence(federation: FederationSection) -> None:
    """What a silo changes must be bounded by the clip, and by nothing that follows from its rows."""
    if federation.weights.kind != "equal":
        raise ValueError(
            f"federation.weights: by {federation.weights.kind!r} a silo's influence follows from its rows, and the sum "
            "of weights has no noise; set weights = 'equal'"
        )
    if federation.fairness.kind != "none":
        raise ValueError(
            "federation.fairness: a weight that follows from a silo's loss leaves without noise; leave fairness out"
        )
    if federation.control != "none":
        raise ValueError(
            "federation.control: the root's control would have the sum's noise and the silos' would not, so that it is "
            "no longer their mean; set control = 'none'"
        )
    if federation.buffer is not None:
        raise ValueError(
            "federation.buffer: noise is measured for rounds in which all silos count alike; leave buffer out"
        )


def _check_root(recipe: Recipe) -> None:
    """What the root noises is a mean of silos, before anybody else or any rule has seen it."""
    federation = recipe.federation
    if recipe.edge or federation.robust:
        key = "edge" if recipe.edge else "federation.rule"
        raise ValueError(
            f"{key}: what the root noises is the mean of silos' updates, and with {key} it forms no such mean; "
            f"leave {key} out, or set federation.noise.where = 'silos'"
        )


def _check_silos(recipe: Recipe) -> None:
    """Silos clip what crosses, once, to the ring; and their noise reaches all who look."""
    federation, update, noise = recipe.federation, recipe.boundary.update, recipe.federation.noise
    assert noise is not None
    if update.mechanism != "gaussian" or update.clip or update.noise not in UNTOUCHED:
        raise ValueError(
            "boundary.update: with federation.noise the sum is noised, not each update; leave boundary.update out"
        )
    if federation.feedback and (federation.compression != "none" or federation.bits is not None):
        raise ValueError(
            "federation.feedback: what waits would be added to every later update and pushed out by the clip again, "
            "without end; set feedback = false"
        )
    if federation.range != type(federation).model_fields["range"].default:
        raise ValueError("federation.range: no number is larger than the clip, which takes its place; leave range out")
    if noise.colluding >= recipe.tree.smallest():
        raise ValueError(
            f"federation.noise.colluding: {noise.colluding} of {recipe.tree.smallest()} silos leave nobody whose noise "
            "counts; lower it, or raise the minimum"
        )
