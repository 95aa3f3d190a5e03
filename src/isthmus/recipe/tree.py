"""The tree of aggregation: silos are the leaves, edges sum what their children send, the root is at the top."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from isthmus.errors import ProtocolError, RecipeError
from isthmus.recipe.sections import EdgeSection, RootSection, SiloSection

ROOT = "root"


@dataclass(frozen=True)
class Node:
    """The root or an edge."""

    name: str
    address: str
    children: tuple[str, ...]
    """Silos or edges, in the recipe's order."""
    wards: tuple[str, ...]
    """Silos that it takes over if their own edge fails."""
    minimum: int
    """Fewest children that a round needs."""
    patience: float
    """Seconds the others wait for a slow child at the end of a round."""


class Tree:
    """Which party sends its update to which.

    Args:
        patience: seconds the others wait for a slow child of the root at the end of a round.
        buffer: updates of which a round is made, where rounds are asynchronous.
    """

    def __init__(
        self,
        silos: tuple[SiloSection, ...],
        edges: tuple[EdgeSection, ...],
        root: RootSection,
        patience: float,
        buffer: int | None = None,
    ) -> None:
        self.silos = tuple(silo.name for silo in silos)
        self._root, self._patience, self._buffer = root, patience, buffer
        self._edges = {edge.name: edge for edge in edges}
        self._parents = {edge.name: edge.parent or ROOT for edge in edges}
        for edge in edges:
            self._parents |= dict.fromkeys(edge.silos, edge.name)

    @property
    def edges(self) -> tuple[str, ...]:
        """Names of the edges, in the recipe's order."""
        return tuple(self._edges)

    @property
    def parties(self) -> tuple[str, ...]:
        """Names of edges and silos."""
        return (*self._edges, *self.silos)

    def role(self, name: str) -> Literal["silo", "edge", "trunk", "root"]:
        """What a party of the federation is.

        Raises:
            RecipeError: there is none of this name.
        """
        if name == "trunk":
            return "trunk"
        if name == ROOT:
            return "root"
        if name in self._edges:
            return "edge"
        if name in self.silos:
            return "silo"
        known = ", ".join(("trunk", ROOT, *self.parties))
        raise RecipeError(
            f"the recipe has no party {name!r}",
            remedy=f"add a table [[silo]] or [[edge]] for it, or use one of: {known}",
        )

    def parent(self, name: str) -> str:
        """The edge, or ``root``, to which this silo or edge sends its update."""
        return self._parents.get(name, ROOT)

    def sibling(self, name: str) -> str | None:
        """The edge that takes over this edge's silos if it fails."""
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
            minimum = self._root.minimum or self._buffer or len(children)
            return Node(name, self._root.address, children, (), minimum, self._patience)
        edge = self._edges[name]
        wards = tuple(silo for other in self._edges.values() if other.sibling == name for silo in other.silos)
        return Node(name, edge.address, children, wards, edge.minimum or len(children), self._patience_of(edge))

    def leaf(self, name: str) -> bool:
        """Whether the children of this node are silos."""
        return not set(self._children(name)) & self._edges.keys()

    def below(self, name: str) -> frozenset[str]:
        """The silos whose updates can reach this edge: those under it, and those that may turn to it or to an edge
        under it. Of a silo: itself."""
        if name in self.silos:
            return frozenset({name})
        return frozenset(self.node(name).wards).union(*map(self.below, self._children(name)))

    def fewest(self, name: str = ROOT) -> int:
        """Fewest silos with which a round can still be finished, at best."""
        if name in self.silos:
            return 1
        needed = sorted(self.fewest(child) for child in self._children(name))
        return sum(needed[: self.node(name).minimum])

    def smallest(self) -> int:
        """Fewest silos that any node sums which has silos for children."""
        return min(self.node(name).minimum for name in (ROOT, *self._edges) if self.leaf(name))

    def _children(self, name: str) -> tuple[str, ...]:
        return tuple(child for child in self.parties if self.parent(child) == name)

    def _patience_of(self, edge: EdgeSection) -> float:
        """Left out, a quarter of the parent's: under masks an edge waits three times before its parent hears of it."""
        return edge.patience or self.node(self.parent(edge.name)).patience / 4


def check_named(peer: str, named: Sequence[str], allowed: Iterable[str]) -> None:
    """Check the silos that a party names: a name that is none would be waited for, or fill the plan of every silo.

    Raises:
        ProtocolError: one is not allowed, or is named twice.
    """
    if foreign := set(named) - set(allowed):
        raise ProtocolError(
            f"{peer} names {min(foreign)[:64]!r}, which is no silo that it may name by the recipe",
            remedy="give all parties one recipe",
        )
    if len(set(named)) < len(named):
        raise ProtocolError(f"{peer} names a silo twice", remedy="name each silo once")


def listed(peers: Iterable[str]) -> str:
    """The names of peers for a log, no more than ten of them."""
    names = sorted(peers)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "nobody") + more
