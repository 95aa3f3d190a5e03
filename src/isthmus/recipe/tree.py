"""The tree of aggregation: silos are the leaves, edges sum what their children send, the root is at the top."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from isthmus.errors import RecipeError

if TYPE_CHECKING:
    from isthmus.recipe.recipe import Recipe
    from isthmus.recipe.sections import EdgeSection

ROOT = "root"
COHORT = 3
"""Fewest silos of a masked sum: of two, each would know the other's numbers."""


@dataclass(frozen=True)
class Node:
    """The root or an edge, as the recipe has it."""

    name: str
    address: str
    children: tuple[str, ...]
    """Silos or edges, in the recipe's order."""
    wards: tuple[str, ...]
    """Silos that it takes in if their own edge dies."""
    minimum: int
    """Fewest children that a round needs."""
    patience: float
    """Seconds the others wait for a slow child at the end of a round."""


class Tree:
    """Who sends whom what it learned.

    Raises:
        ValueError: the recipe's edges make no tree, or too small cohorts for masks; reason and remedy.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._silos = tuple(silo.name for silo in recipe.silo)
        self._edges = {edge.name: edge for edge in recipe.edge}
        self._parents = {edge.name: edge.parent or ROOT for edge in recipe.edge}
        for edge in recipe.edge:
            self._parents |= dict.fromkeys(edge.silos, edge.name)
        self._check_names()
        self._check_shape()

    @property
    def parties(self) -> tuple[str, ...]:
        """Edges and silos."""
        return (*self._edges, *self._silos)

    def parent(self, name: str) -> str:
        """Of a silo or an edge: an edge or ``root``."""
        return self._parents.get(name, ROOT)

    def sibling(self, name: str) -> str | None:
        """The edge that takes in this one's silos if it dies."""
        return self._edges[name].sibling if name in self._edges else None

    def node(self, name: str) -> Node:
        """The root, or an edge.

        Raises:
            RecipeError: there is none of this name.
        """
        if name != ROOT and name not in self._edges:
            known = ", ".join(self._edges) or "none"
            raise RecipeError(f"the recipe has no edge {name!r}", remedy=f"use one of: {known}")
        children = self._children(name)
        if name == ROOT:
            root = self._recipe.root
            minimum = root.minimum or self._recipe.federation.buffer or len(children)
            return Node(name, root.address, children, (), minimum, root.patience)
        edge = self._edges[name]
        wards = tuple(silo for other in self._recipe.edge if other.sibling == name for silo in other.silos)
        return Node(name, edge.address, children, wards, edge.minimum or len(children), self._patience(edge))

    def leaf(self, name: str) -> bool:
        """Whether the children of this node are silos."""
        return not set(self._children(name)) & self._edges.keys()

    def fewest(self, name: str = ROOT) -> int:
        """Silos with which a round can still be finished, at best."""
        if name in self._silos:
            return 1
        needed = sorted(self.fewest(child) for child in self._children(name))
        return sum(needed[: self.node(name).minimum])

    def smallest(self) -> int:
        """Fewest silos that any node sums which has silos for children."""
        return min(self.node(name).minimum for name in (ROOT, *self._edges) if self.leaf(name))

    def _children(self, name: str) -> tuple[str, ...]:
        return tuple(child for child in self.parties if self.parent(child) == name)

    def _patience(self, edge: EdgeSection) -> float:
        """Left out, a quarter of the parent's: under masks an edge waits three times before its parent hears of it."""
        return edge.patience or self.node(self.parent(edge.name)).patience / 4

    def _check_names(self) -> None:
        listed = [silo for edge in self._recipe.edge for silo in edge.silos]
        for edge in self._recipe.edge:
            if strangers := set(edge.silos) - set(self._silos):
                raise ValueError(f"edge {edge.name!r}: no silo is called {min(strangers)!r}; name silos of the recipe")
            for key, other in (("parent", edge.parent), ("sibling", edge.sibling)):
                if other is not None and (other not in self._edges or other == edge.name):
                    raise ValueError(f"edge {edge.name!r}: {key} = {other!r} is no other edge; name one")
            if edge.sibling is not None and not self.leaf(edge.sibling):
                raise ValueError(f"edge {edge.name!r}: sibling {edge.sibling!r} has no silos; name one that has")
        if twice := {silo for silo in listed if listed.count(silo) > 1}:
            raise ValueError(f"the silo {min(twice)!r} has two edges; leave it to one")

    def _check_shape(self) -> None:
        for edge in self._edges:
            above = [edge]
            while (parent := self.parent(above[-1])) != ROOT:
                if parent in above:
                    raise ValueError(f"edge {edge!r} is above itself; let its parents end at the root")
                above.append(parent)
        for name in (ROOT, *self._edges):
            node = self.node(name)
            if not node.children:
                raise ValueError(f"the edge {name!r} has neither silos nor edges; give it some or leave it out")
            if node.minimum > len(node.children):
                what = "silos" if self.leaf(name) else "children"
                raise ValueError(
                    f"{name}.minimum: {node.minimum} {what} needed but {len(node.children)} listed; lower it"
                )
            if self._recipe.federation.masks:
                self._check_cohort(node)

    def _check_cohort(self, node: Node) -> None:
        if self.leaf(node.name) and node.minimum < COHORT:
            raise ValueError(
                "federation.masks: of a sum of two silos' updates each knows the other's; "
                f"have three silos, and {node.name}.minimum = {COHORT} or more"
            )
        if not self.leaf(node.name) and set(node.children) & set(self._silos):
            raise ValueError(
                f"federation.masks: a silo beside edges would be seen by itself at {node.name!r}; give it an edge, too"
            )
