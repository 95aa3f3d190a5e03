"""Names of the parties, and the tree that silos and edges form."""

from __future__ import annotations

from isthmus.recipe.sections import EdgeSection, SiloSection
from isthmus.recipe.tree import ROOT, Tree

TAKEN = {"trunk", ROOT, "ca"}


def check_names(silos: tuple[SiloSection, ...], edges: tuple[EdgeSection, ...]) -> None:
    """Refuse names that two parties share or that are roles."""
    names = [*(edge.name for edge in edges), *(silo.name for silo in silos)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the name {twice[0]!r} is given twice; rename one")
    if taken := sorted(TAKEN & set(names)):
        raise ValueError(
            f"the name {taken[0]!r} is taken: 'trunk', 'root' and 'ca' are roles; give this silo or edge another name"
        )


def check_tree(tree: Tree, edges: tuple[EdgeSection, ...]) -> None:
    """Refuse edges that form no tree."""
    _check_links(tree, edges)
    for edge in tree.edges:
        above = [edge]
        while (parent := tree.parent(above[-1])) != ROOT:
            if parent in above:
                raise ValueError(f"edge {edge!r} is above itself; let its parents end at the root")
            above.append(parent)
    for name in (ROOT, *tree.edges):
        node = tree.node(name)
        if not node.children:
            raise ValueError(f"the edge {name!r} has neither silos nor edges; give it some or leave it out")
        if node.minimum > len(node.children):
            kind = "silos" if tree.leaf(name) else "children"
            raise ValueError(f"{name}.minimum: {node.minimum} {kind} needed but {len(node.children)} listed; lower it")


def _check_links(tree: Tree, edges: tuple[EdgeSection, ...]) -> None:
    listed = [silo for edge in edges for silo in edge.silos]
    for edge in edges:
        if strangers := set(edge.silos) - set(tree.silos):
            raise ValueError(f"edge {edge.name!r}: no silo is called {min(strangers)!r}; name silos of the recipe")
        for key, other in (("parent", edge.parent), ("sibling", edge.sibling)):
            if other is not None and (other not in tree.edges or other == edge.name):
                raise ValueError(f"edge {edge.name!r}: {key} = {other!r} is no other edge; name one, or leave it out")
        if edge.sibling is not None and not tree.leaf(edge.sibling):
            raise ValueError(
                f"edge {edge.name!r}: sibling {edge.sibling!r} has no silos; name one that has, or leave sibling out"
            )
    if twice := {silo for silo in listed if listed.count(silo) > 1}:
        raise ValueError(f"the silo {min(twice)!r} has two edges; leave it to one")
