"""Secure aggregation: cohorts, and compression of masked sums."""

from __future__ import annotations

from isthmus.recipe.sections import FederationSection
from isthmus.recipe.sections.federation.compression import UNDER_MASKS
from isthmus.recipe.tree import ROOT, Node, Tree

COHORT = 3
"""Fewest silos of a masked sum: of two, each would know the other's numbers."""


def check_cohorts(federation: FederationSection, tree: Tree) -> None:
    """Refuse masked sums of so few silos that one of them knows another's update."""
    if federation.secure.masks:
        for name in (ROOT, *tree.edges):
            _check_cohort(tree.node(name), tree)


def _check_cohort(node: Node, tree: Tree) -> None:
    if tree.leaf(node.name) and node.minimum < COHORT:
        raise ValueError(
            "federation.secure.masks: of a sum of two silos' updates each knows the other's; "
            f"have three silos, and {node.name}.minimum = {COHORT} or more"
        )
    if not tree.leaf(node.name) and set(node.children) & set(tree.silos):
        raise ValueError(
            f"federation.secure.masks: {node.name!r} would see the update of a silo beside edges by itself; "
            "give that silo an edge, too"
        )


def check_compression(federation: FederationSection) -> None:
    """Refuse compression that masked sums, or open updates, cannot have."""
    masks, compression = federation.secure.masks, federation.compression
    if masks and not UNDER_MASKS[compression.kind]:
        fitting = ", ".join(name for name, fits in UNDER_MASKS.items() if fits)
        raise ValueError(
            f"federation.compression: a masked sum adds the same places of all silos, and {compression.kind} sends "
            f"each silo's own; use one of {fitting}, or set federation.secure.masks = false"
        )
    allowed = range(2, 17) if masks else (4, 8, 16, 32)
    if compression.bits is not None and compression.bits not in allowed:
        known = "2 to 16 with masks" if masks else "4, 8, 16 or 32"
        raise ValueError(
            f"federation.compression.bits: {compression.bits} bits for a number are not possible; "
            f"use {known}, or leave bits out"
        )
