"""The stash: activations that autograd saves for backwards that have not come yet, counted and bounded in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes(saved_tensors_hooks):
    """Context that counts the bytes that autograd saves in it, each storage once.

    Args:
        known: tensors that exist anyway, such as parameters, and are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._found: dict[int, int] = {}
        super().__init__(self._count, lambda tensor: tensor)

    @property
    def nbytes(self) -> int:
        """Bytes counted so far."""
        return sum(self._found.values())

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a tensor that its own graph held would never be freed


@dataclass(eq=False)
class Pass:
    """One forward pass over several silos' steps."""

    inputs: list[torch.Tensor]
    """Input of each step, ``[T, D]``, an autograd leaf."""
    leaves: list[list[torch.Tensor]]
    """Adapter tensors of each step, autograd leaves."""
    outputs: tuple[torch.Tensor, ...] | None
    """Output of each step, ``[T, D]``, with its graph; None after the first backward, or once it was dropped."""
    number: int = 0
    """Passes are numbered in their order."""
    graph_bytes: int = 0
    """Bytes that the graph holds."""
    rows: Counter[str] = field(default_factory=Counter)
    """By silo, the tokens of its steps."""

    @property
    def nbytes(self) -> int:
        """Bytes that the pass holds now."""
        return 0 if self.outputs is None else self.graph_bytes

    def drop(self) -> None:
        """Free the graph. What needs it later computes it again from the kept inputs."""
        self.outputs = None
        self.inputs, self.leaves = [], []


def bound_stash(passes: Iterable[Pass], limit: int) -> None:
    """Drop graphs until the rest have at most ``limit`` bytes: the oldest of the silo that holds most, and those that
    it shares with other silos last.

    Args:
        passes: from the oldest to the newest.
    """
    kept = [computed for computed in passes if computed.outputs is not None]
    while kept and sum(computed.nbytes for computed in kept) > limit:
        held: Counter[str] = Counter()
        for computed in kept:
            for silo, rows in computed.rows.items():
                held[silo] += computed.nbytes * rows // computed.rows.total()
        greedy = held.most_common(1)[0][0]
        dropped = min((one for one in kept if greedy in one.rows), key=lambda one: len(one.rows) > 1)
        dropped.drop()
        kept.remove(dropped)
