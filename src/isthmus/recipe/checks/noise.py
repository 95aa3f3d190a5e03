"""Noise of a round's sum (``federation.noise``), beside everything that a silo's influence depends on."""

from __future__ import annotations

from isthmus.recipe.sections import EdgeSection, FederationSection, NoiseSection, ReleaseSection, TrainSection
from isthmus.recipe.tree import Tree

UNTOUCHED = 0.0, 1e-4
"""``boundary.update.noise`` of a recipe that does not set it, or sets none."""


def check_noise(
    train: TrainSection,
    federation: FederationSection,
    update: ReleaseSection,
    edges: tuple[EdgeSection, ...],
    tree: Tree,
) -> None:
    """Refuse noise that would not give the privacy that the recipe states."""
    if (federation.noise is None) != (federation.clip is None):
        has, lacks = ("clip", "noise") if federation.noise is None else ("noise", "clip")
        raise ValueError(
            f"federation.{lacks}: noise is measured by a clip, and a clip alone hides nothing; "
            f"add federation.{lacks}, or leave federation.{has} out"
        )
    if federation.noise is None:
        return
    if not train.rounds:
        raise ValueError(
            "federation.noise: with train.rounds = 0 there is no sum to add noise to; leave federation.noise out, or "
            "raise train.rounds"
        )
    _check_influence(federation)
    if federation.noise.where == "root":
        _check_root(federation, edges)
    if federation.secure.masks:
        _check_silos(federation, federation.noise, update, tree)
    elif federation.noise.where == "silos":
        raise ValueError(
            "federation.noise: without masks the root sees each update, with less noise than the sum is to have; "
            "set federation.secure.masks = true, or leave federation.noise and federation.clip out and have "
            "boundary.update noise each update"
        )


def _check_influence(federation: FederationSection) -> None:
    """A silo's influence must be bounded by the clip, and depend on nothing that follows from its rows."""
    if federation.weights.kind != "equal":
        raise ValueError(
            f"federation.weights: by {federation.weights.kind!r} a silo's influence follows from its rows, and the sum "
            "of weights has no noise; set federation.weights = 'equal'"
        )
    if federation.fairness.kind != "none":
        raise ValueError(
            "federation.fairness: a weight that follows from a silo's loss leaves without noise; leave fairness out"
        )
    if federation.control != "none":
        raise ValueError(
            "federation.control: the root's control would have the sum's noise and the silos' would not, so that it is "
            "no longer their mean; set federation.control = 'none'"
        )
    if federation.asynchronous.buffer is not None:
        raise ValueError(
            "federation.asynchronous.buffer: noise is measured for rounds in which all silos count alike; "
            "leave buffer out"
        )


def _check_root(federation: FederationSection, edges: tuple[EdgeSection, ...]) -> None:
    """The root noises a mean of silos, before anybody else or any rule has seen it."""
    if edges or federation.robust.active:
        key = "[[edge]]" if edges else "federation.robust"
        raise ValueError(
            f"{key}: the root noises the mean of silos' updates, and with {key} it forms no such mean; "
            f"leave {key} out, or set federation.noise.where = 'silos'"
        )


def _check_silos(federation: FederationSection, noise: NoiseSection, update: ReleaseSection, tree: Tree) -> None:
    """Silos clip what crosses, once, to the ring; and their noise reaches everybody who sees a sum."""
    compression, secure = federation.compression, federation.secure
    if update.mechanism != "gaussian" or update.clip or update.noise not in UNTOUCHED:
        raise ValueError(
            "boundary.update: with federation.noise the sum is noised, not each update; leave boundary.update out"
        )
    if compression.feedback and not compression.exact:
        raise ValueError(
            "federation.compression.feedback: what waits would be added to every later update and cut off by the clip "
            "again, without end; set federation.compression.feedback = false"
        )
    if secure.range != type(secure).model_fields["range"].default:
        raise ValueError(
            "federation.secure.range: no number is larger than federation.clip, which takes its place; leave range out"
        )
    if noise.colluding >= tree.smallest():
        raise ValueError(
            f"federation.noise.colluding: {noise.colluding} of {tree.smallest()} silos leave nobody whose noise "
            "counts; lower it, or raise the minimum"
        )
