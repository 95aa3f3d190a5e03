"""Blocks that some silos keep and others leave to the trunk: what root and trunk tell one another of their adapters.

Both work in one process; nothing of this crosses a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import torch


class BlocksChange(NamedTuple):
    """What a round changed on the trunk in blocks that the same silos pass."""

    weight: float
    """Tokens of these silos' answers in the round."""
    change: Mapping[str, torch.Tensor]
    """New minus old, by uncut name."""


class TrunkBlocks(Protocol):
    """The trunk's copy of such blocks, as the root reaches it."""

    def trained(self, round: int) -> Future[list[BlocksChange]]:
        """What this round changed; a weight is 0 where nobody's tokens passed.

        The future raises ``RoundLostError`` if the trunk has not saved that round.
        """
        ...

    def settle(self, completed: int, shared: Mapping[str, torch.Tensor]) -> Future[None]:
        """Go to the end of this round with the root's tensors; the trunk's rounds up to it are over.

        Args:
            shared: by uncut name; others than those blocks' are ignored.

        The future raises ``ProtocolError`` if the trunk has no state of that round.
        """
        ...
