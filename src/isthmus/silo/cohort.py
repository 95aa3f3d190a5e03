"""The silos that a silo is willing to be in a masked sum with, by its own recipe."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from isthmus.errors import ProtocolError
from isthmus.recipe.tree import Node
from isthmus.updates.masking import FEWEST
from isthmus.wire import isthmus_pb2 as pb


@dataclass(frozen=True)
class Cohort:
    """The silos that may be in a masked sum with this one, by its own recipe, whatever an aggregator says."""

    silos: frozenset[str]
    minimum: int
    """Fewest silos whose changes a sum must hold."""

    @classmethod
    def of(cls, node: Node) -> Cohort:
        """The silos of an aggregator: its own, and those that turn to it when their edge fails."""
        return cls(frozenset((*node.children, *node.wards)), max(node.minimum, FEWEST))

    def check(self, plan: pb.Plan, added: Collection[str] = ()) -> None:
        """Check the members of a plan's sum.

        Args:
            added: further silos of the cohort, as the authority says.

        Raises:
            ProtocolError: one is no silo of this cohort, or does not take part; or they are too few.
        """
        if foreign := plan.keys.keys() - self.silos - set(added):
            raise ProtocolError(
                f"a plan for a sum with {min(foreign)!r}, which is no silo of this cohort in the recipe",
                remedy="leave this aggregator, or give all parties one recipe",
            )
        if absent := plan.keys.keys() - set(plan.participants):
            raise ProtocolError(
                f"a plan with keys of {min(absent)!r}, which does not take part", remedy="give all parties one recipe"
            )
        self.require(len(plan.keys), "in a plan's sum")

    def require(self, count: int, what: str) -> None:
        """Raise ``ProtocolError`` if these silos are fewer than the recipe's minimum."""
        if count < self.minimum:
            raise ProtocolError(
                f"{count} silos {what}, the recipe needs {self.minimum}: nothing is revealed",
                remedy="leave this aggregator, which should have begun the round again; or give all parties one recipe",
            )
