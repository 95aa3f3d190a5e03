"""Rules against malicious silos: what they compare, and how many contributions they need."""

from __future__ import annotations

from isthmus.recipe.sections import FederationSection
from isthmus.recipe.tree import ROOT, Tree


def check_robustness(federation: FederationSection, tree: Tree) -> None:
    """Refuse a rule that could not withstand the share of malicious contributions that it is for."""
    robust, root = federation.robust, tree.node(ROOT)
    if federation.secure.masks and robust.active and not tree.edges:
        raise ValueError(
            "federation.robust: under masks the root sees one sum, with nothing to compare it to; "
            "set federation.robust.rule = 'mean' and mix = false, or federation.secure.masks = false, "
            "or add edges, whose sums are compared"
        )
    if (robust.rule == "fltrust") != (robust.trusted is not None):
        raise ValueError(
            "federation.robust.trusted: the rule 'fltrust' needs it, and no other takes it; "
            "name a silo, or leave it out"
        )
    if robust.trusted not in (None, *root.children):
        known = ", ".join(root.children)
        raise ValueError(
            f"federation.robust.trusted: {robust.trusted!r} sends nothing to the root; use one of: {known}"
        )
    if robust.trusted and robust.mix:
        raise ValueError("federation.robust.mix: the trusted change must stay as it is; set mix = false")
    kind = "silos" if tree.leaf(ROOT) else "edges"
    for count in range(root.minimum, len(root.children) + 1):
        if count < robust.fewest(count):
            raise ValueError(
                f"federation.robust.rule: of {count} {kind} {robust.faults(count)} may be malicious, and against that "
                f"{robust.rule!r} needs {robust.fewest(count)}; "
                f"change federation.robust.rule or malicious, have more {kind}, or raise root.minimum"
            )
