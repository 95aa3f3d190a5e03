"""A process's share of a part, where several processes hold its blocks together."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.errors import NotSupportedError


@dataclass(frozen=True)
class BlockShare:
    """The blocks of a part that one of several processes holds, one stretch after another by rank.

    Args:
        rank: the process's number, from 0.
        ranks: how many there are.
    """

    rank: int
    ranks: int

    def blocks(self, total: int) -> range:
        """Its blocks of a part that has so many in all. Numbers of blocks differ by one at most.

        Raises:
            NotSupportedError: there are fewer blocks than ranks.
        """
        if total < self.ranks:
            raise NotSupportedError(
                f"{self.ranks} ranks cannot share the {total} blocks of the trunk",
                remedy=f"start {total} ranks at most",
            )
        return range(total * self.rank // self.ranks, total * (self.rank + 1) // self.ranks)
