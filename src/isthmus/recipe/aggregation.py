"""What cannot be asked of a round at once: ranks, weights, rules, masks and edges against one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.recipe.strategy import FROM_UPDATES
from isthmus.recipe.tree import ROOT

if TYPE_CHECKING:
    from isthmus.recipe.recipe import Recipe


def check_aggregation(recipe: Recipe) -> None:
    """Raise ``ValueError``, reason and remedy, if no root could do what the recipe asks for."""
    _check_ranks(recipe)
    _check_products(recipe)
    _check_weights(recipe)
    _check_promises(recipe)
    _check_rule(recipe)


def _check_ranks(recipe: Recipe) -> None:
    """Ranks that no root could bring together."""
    ranks = [silo.rank for silo in recipe.silo if silo.rank is not None]
    if ranks and recipe.federation.lora != "svd":
        raise ValueError("silo.rank: factors of different ranks have no mean; set federation.lora = 'svd'")
    if max(ranks, default=0) > recipe.lora.rank:
        raise ValueError(f"silo.rank: the root keeps rank {recipe.lora.rank}, less than {max(ranks)}; raise lora.rank")


def _check_products(recipe: Recipe) -> None:
    """Products are formed of single silos' factors, and replace the mean, its rule and its optimizer."""
    federation = recipe.federation
    if federation.lora != "svd":
        return
    if federation.masks:
        raise ValueError(
            "federation.lora: the root multiplies each silo's factors, and of a masked sum it knows none; "
            "set federation.lora = 'alternating', or masks = false"
        )
    if recipe.edge:
        raise ValueError(
            "federation.lora: the root multiplies each silo's factors, and edges pass on cohorts' means; "
            "set federation.lora = 'alternating', or leave [[edge]] out"
        )
    asked = {
        "weights": federation.weights.kind != "examples",
        "optimizer": federation.optimizer.kind != "none",
        "rule": federation.robust,
        "compression": federation.compression != "none" or federation.bits is not None,
    }
    for key in (key for key, changed in asked.items() if changed):
        raise ValueError(
            f"federation.{key}: products of factors are averaged by tokens and taken as they are, and each round has "
            f"new factors; with lora = 'svd' leave {key} out"
        )


def _check_weights(recipe: Recipe) -> None:
    """Weights that ask for what the root does not see."""
    federation, weights, fairness = recipe.federation, recipe.federation.weights, recipe.federation.fairness.kind
    if weights.kind == "quality" and not all(silo.held_out for silo in recipe.silo):
        raise ValueError("federation.weights: 'quality' is measured on held_out rows; give them to every silo")
    if weights.kind == "equal" and recipe.edge and not federation.masks:
        raise ValueError(
            "federation.weights: by 'equal' whoever sends counts for one, and an edge sends for a whole cohort; "
            "weigh by 'examples', or set federation.masks = true"
        )
    if weights.claimed:
        if federation.robust and fairness != "none":
            raise ValueError(
                f"federation.fairness: the rule {federation.rule!r} counts all alike, whatever they say they weigh; "
                "set rule = 'mean' and mix = false, or leave fairness out"
            )
        return
    if federation.masks and not (recipe.edge and weights.kind in FROM_UPDATES):
        raise ValueError(
            f"federation.weights: {weights.kind!r} weighs single updates, and under masks the root sees none; "
            "weigh by 'examples' or 'equal', or set federation.masks = false"
        )
    if weights.kind == "quality" and recipe.edge:
        raise ValueError(
            "federation.weights: by 'quality' the root weighs silos, and edges pass on cohorts; leave [[edge]] out"
        )
    if fairness != "none":
        raise ValueError(
            f"federation.fairness: {weights.kind!r} overlooks what a silo says it weighs; "
            "set federation.weights = 'examples' or 'equal'"
        )


def _check_promises(recipe: Recipe) -> None:
    """Weights that break what clip and noise promise."""
    weights, fairness, update = recipe.federation.weights.kind, recipe.federation.fairness.kind, recipe.boundary.update
    if weights in FROM_UPDATES and update.bounded and update.mechanism != "gaussian":
        raise ValueError(
            f"federation.weights: by {weights!r} a silo's update moves the others' weights, too, so the clip of "
            "boundary.update no longer bounds its influence; weigh by 'examples' or 'equal'"
        )
    for key, follows in (("weights", weights == "quality"), ("fairness", fairness != "none")):
        if follows and update.bounded:
            raise ValueError(
                f"federation.{key}: a weight that follows from rows leaves without noise, so the epsilon of "
                f"boundary.update would not cover it; leave federation.{key} out, or the clip"
            )


def _check_rule(recipe: Recipe) -> None:
    """A rule that could not do what it is for."""
    federation, root = recipe.federation, recipe.tree.node(ROOT)
    if federation.masks and federation.robust and not recipe.edge:
        raise ValueError(
            "federation.rule: under masks the root sees one sum, with nothing to compare it to; "
            "set rule = 'mean' and mix = false, or masks = false, or have edges whose sums are compared"
        )
    if (federation.rule == "fltrust") != (federation.trusted is not None):
        raise ValueError(
            "federation.trusted: the rule 'fltrust' needs it, and no other takes it; name a silo, or leave it out"
        )
    if federation.trusted not in (None, *root.children):
        known = ", ".join(root.children)
        raise ValueError(f"federation.trusted: {federation.trusted!r} sends the root nothing; use one of: {known}")
    if federation.trusted and federation.mix:
        raise ValueError("federation.mix: the trusted change must stay as it is; set mix = false")
    for count in range(root.minimum, len(root.children) + 1):
        if count < federation.fewest(count):
            what = "silos" if recipe.tree.leaf(ROOT) else "edges"
            raise ValueError(
                f"federation.rule: of {count} {what} {federation.faults(count)} may be malicious, and to bear that "
                f"{federation.rule!r} takes {federation.fewest(count)}; "
                f"change rule or federation.malicious, have more {what}, or raise root.minimum"
            )
