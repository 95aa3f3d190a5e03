"""Averaging of adapters: ranks, products of factors, and weights."""

from __future__ import annotations

from collections.abc import Collection

from isthmus.recipe.sections import EdgeSection, FederationSection, LoraSection, ReleaseSection, SiloSection
from isthmus.recipe.sections.federation.weights import FROM_UPDATES


def check_ranks(lora: LoraSection, federation: FederationSection, silos: tuple[SiloSection, ...]) -> None:
    """Refuse ranks of single silos that no root could average."""
    ranks = [silo.rank for silo in silos if silo.rank is not None]
    if ranks and federation.lora != "svd":
        raise ValueError("silo.rank: factors of different ranks have no mean; set federation.lora = 'svd'")
    if max(ranks, default=0) > lora.rank:
        raise ValueError(f"silo.rank: the root keeps rank {lora.rank}, less than {max(ranks)}; raise lora.rank")
    if ranks and lora.start is not None:
        raise ValueError(
            "silo.rank: an adapter to start from has one rank, lora.rank; leave silo.rank out, or leave lora.start out"
        )


def check_products(federation: FederationSection, edges: tuple[EdgeSection, ...]) -> None:
    """Refuse products of factors beside masks, edges, and all that acts on the mean that they replace."""
    if federation.lora != "svd":
        return
    if federation.secure.masks:
        raise ValueError(
            "federation.lora: the root multiplies each silo's factors, and of a masked sum it knows none; "
            "set federation.lora = 'alternating', or federation.secure.masks = false"
        )
    if edges:
        raise ValueError(
            "federation.lora: the root multiplies each silo's factors, and edges pass on cohorts' means; "
            "set federation.lora = 'alternating', or leave [[edge]] out"
        )
    if federation.max_change is not None:
        raise ValueError(
            "federation.max_change: with lora = 'svd' each round has new factors, however little their product "
            "changes; leave max_change out, or set federation.lora = 'alternating'"
        )
    present = {
        "weights": federation.weights.kind != "examples",
        "optimizer": federation.optimizer.kind != "none",
        "robust": federation.robust.active,
        "compression": not federation.compression.exact,
    }
    for key in (key for key, changed in present.items() if changed):
        raise ValueError(
            f"federation.{key}: with lora = 'svd' products of factors are averaged by tokens and taken as they are, "
            f"and each round has new factors; leave federation.{key} out, or set federation.lora = 'alternating'"
        )


def check_weights(
    federation: FederationSection,
    silos: tuple[SiloSection, ...],
    edges: tuple[EdgeSection, ...],
    evaluating: Collection[str],
) -> None:
    """Refuse weights that depend on values the root does not see.

    Args:
        evaluating: the silos that have held-out rows.
    """
    weights, fairness, masks = federation.weights, federation.fairness.kind, federation.secure.masks
    if weights.kind == "quality" and len(evaluating) < len(silos):
        raise ValueError("federation.weights: 'quality' is measured on held_out rows; give them to every silo")
    if weights.kind == "equal" and edges and not masks:
        raise ValueError(
            "federation.weights: by 'equal' each sender counts for one, and an edge sends for a whole cohort; "
            "weigh by 'examples', or set federation.secure.masks = true"
        )
    if weights.claimed:
        if federation.robust.active and fairness != "none":
            raise ValueError(
                f"federation.fairness: the rule {federation.robust.rule!r} counts all alike, whatever weight they "
                "claim; set federation.robust.rule = 'mean' and mix = false, or leave fairness out"
            )
        return
    if masks and not (edges and weights.kind in FROM_UPDATES):
        raise ValueError(
            f"federation.weights: {weights.kind!r} weighs single updates, and under masks the root sees none; "
            "weigh by 'examples' or 'equal', or set federation.secure.masks = false"
        )
    if weights.kind == "quality" and edges:
        raise ValueError(
            "federation.weights: by 'quality' the root weighs silos, and edges pass on cohorts; leave [[edge]] out, "
            "or weigh by 'examples'"
        )
    if fairness != "none":
        raise ValueError(
            f"federation.fairness: {weights.kind!r} ignores the weight that a silo claims; "
            "set federation.weights = 'examples' or 'equal', or leave fairness out"
        )


def check_influence(federation: FederationSection, update: ReleaseSection) -> None:
    """Refuse weights for which the clip and noise of updates would not give the stated epsilon."""
    weights, fairness = federation.weights.kind, federation.fairness.kind
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
