"""Frozen linear layers of the trunk's blocks whose weights are spread over several processes, by rows.

Rank 0 is the trunk, with all that a trunk has. The other ranks hold rows of the weights and do nothing but products:
rank 0 sends a layer's input, each rank multiplies, rank 0 joins the results. They keep nothing of a pass.

Every message has rank 0 at one end, so that it knows which rank is gone, and sums in one order.

Shapes: T tokens, N outputs (rows of a weight), K inputs, n rows of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from isthmus.errors import RankLostError
from isthmus.model.cut import Cut, Part
from isthmus.model.share import RowShare
from isthmus.trunk.scheduler import ComputeOver

PRODUCT_SECONDS = 300.0
"""Longest time that rank 0 waits for one product of another rank."""
UNBOUNDED = timedelta(days=3650)
"""For what comes when silos ask for it, and for loading."""


class Order(IntEnum):
    """What rank 0 asks of the others. Two numbers follow."""

    LOAD = 0
    """The rows of the trunk of this cut: bottom, top."""
    FORWARD = 1
    """The product of inputs ``[T, K]``, which follow, with a weight: the layer's number, T."""
    BACKWARD = 2
    """The inputs' gradient for a gradient of the rank's outputs ``[T, n]``, which follows: the layer's number, T."""
    END = 3
    """Nothing more."""


class Ranks:
    """The ranks that hold the weights together, as rank 0 has them; torch.distributed has connected them.

    Args:
        count: how many there are, rank 0 included.
    """

    def __init__(self, count: int) -> None:
        self.share = RowShare(0, count)
        """The rows of rank 0."""
        self._others = [RowShare(rank, count) for rank in range(1, count)]
        self._lost: RankLostError | None = None

    def check(self) -> None:
        """Raise ``RankLostError`` if a rank has been lost."""
        if self._lost is not None:
            raise self._lost

    def load(self, cut: Cut) -> None:
        """Have all others load their rows of the trunk of this cut.

        Raises:
            RankLostError: one is gone.
        """
        self._order(Order.LOAD, cut.bottom, cut.top)

    def wait_loaded(self) -> None:
        """Wait until all others have loaded what ``load`` asked for.

        Raises:
            RankLostError: one is gone, for want of memory or of a tensor.
        """
        for share in self._others:
            with self._noting(share.rank):
                receive(torch.empty(1), share.rank, UNBOUNDED)

    def multiply(self, layer: int, x_TK: torch.Tensor, weight_nK: torch.Tensor, outputs: int) -> torch.Tensor:
        """Inputs times a layer's whole weight, ``[T, N]``.

        Args:
            layer: its number.
            weight_nK: the rows of rank 0.
            outputs: N.

        Raises:
            ComputeOver: a rank is gone.
        """
        x_TK = x_TK.contiguous()
        replies = [x_TK.new_empty(len(x_TK), share.size(outputs)) for share in self._others]
        with self._exchange([Order.FORWARD, layer, len(x_TK)], [x_TK] * len(replies), replies):
            own_Tn = linear(x_TK, weight_nK)
        return torch.cat([own_Tn, *replies], dim=-1)

    def multiply_back(self, layer: int, gradient_TN: torch.Tensor, weight_nK: torch.Tensor) -> torch.Tensor:
        """A gradient of a layer's outputs times its whole weight, ``[T, K]``; the ranks' parts are summed in fp32.

        Raises:
            ComputeOver: a rank is gone.
        """
        tokens, outputs = gradient_TN.shape
        slices = [gradient_TN[:, share.rows(outputs)].contiguous() for share in self._others]
        replies = [gradient_TN.new_empty(tokens, weight_nK.shape[1]) for _ in slices]
        with self._exchange([Order.BACKWARD, layer, tokens], slices, replies):
            total_TK = (gradient_TN[:, self.share.rows(outputs)] @ weight_nK).float()
        for part_TK in replies:
            total_TK += part_TK
        return total_TK.to(gradient_TN.dtype)

    def end(self) -> None:
        """Have all others end; one that is gone is noted for ``check``. The compute thread must have ended."""
        if self._lost is None:
            try:
                self._order(Order.END)
            except RankLostError as lost:
                self._lost = lost

    def _order(self, *numbers: int) -> None:
        order = order_of(*numbers)
        for share in self._others:
            with self._noting(share.rank):
                dist.send(order, share.rank)

    @contextmanager
    def _exchange(
        self, order: Sequence[int], sent: Sequence[torch.Tensor], replies: Sequence[torch.Tensor]
    ) -> Iterator[None]:
        """Send the others an order and each its tensor; when the block is over, also by an error, fill their replies.
        A reply that stayed behind would be taken for that of the next product.

        Raises:
            ComputeOver: a rank is gone.
        """
        ranks = [share.rank for share in self._others]
        under_way = []
        with _unanswered():
            self._order(*order)
            for rank, tensor in zip(ranks, sent, strict=True):
                with self._noting(rank):
                    under_way.append(_pending(dist.isend(tensor, rank)))
        try:
            yield
        finally:
            with _unanswered():
                for rank, work, reply in zip(ranks, under_way, replies, strict=True):
                    with self._noting(rank):
                        receive(reply, rank, timedelta(seconds=PRODUCT_SECONDS))
                        work.wait()

    @contextmanager
    def _noting(self, rank: int) -> Iterator[None]:
        """Note the rank as lost where the block fails."""
        try:
            with named(rank):
                yield
        except RankLostError as lost:
            self._lost = lost
            raise


@contextmanager
def _unanswered() -> Iterator[None]:
    """Within the block a lost rank ends the compute thread, and no silo is answered with an error."""
    try:
        yield
    except RankLostError as lost:
        raise ComputeOver(lost) from lost


@contextmanager
def named(rank: int) -> Iterator[None]:
    """Within the block an error of torch.distributed names this rank.

    Raises:
        RankLostError: it is gone, or answers nothing.
    """
    try:
        yield
    except RuntimeError as error:
        silent = "timed out" in str(error).lower()
        how = f"does not answer (waited {PRODUCT_SECONDS:g} seconds)" if silent else "is gone"
        raise RankLostError(
            f"rank {rank}, which holds a share of the trunk's weights, {how}",
            remedy="its own output says why; start all ranks again (torchrun --max-restarts does), and silos go on",
        ) from error


def order_of(*numbers: int) -> torch.Tensor:
    """An order and its numbers as one tensor, ``[3]``."""
    return torch.tensor([*numbers, 0, 0, 0][:3])


def receive(into: torch.Tensor, rank: int, patience: timedelta) -> None:
    """Fill a tensor with what this rank sends.

    Raises:
        RuntimeError: it is gone, or sends nothing for so long (of CUDA tensors, torch ends the process then).
    """
    _pending(dist.irecv(into, rank)).wait(patience)


def _pending(work: dist.Work | None) -> dist.Work:
    """The work, which torch.distributed gives to all that belong to a group."""
    assert work is not None
    return work


def follow(load: Callable[[Cut], list[torch.Tensor]]) -> None:
    """Do what rank 0 asks for, until it ends.

    Args:
        load: gives this rank's rows of all weights of the trunk of a cut (``model.cut.load_rows``).

    Raises:
        RankLostError: rank 0 is gone.
    """
    weights: list[torch.Tensor] = []
    order = order_of()
    with torch.inference_mode():
        while True:
            kind, first, second = _taken(order).tolist()
            if kind == Order.END:
                return
            if kind == Order.LOAD:
                weights.clear()
                weights = load(Cut(first, second))
                _give(torch.zeros(1))
            else:
                _give(_product(Order(kind), weights[first], second))


def _product(kind: Order, weight_nK: torch.Tensor, tokens: int) -> torch.Tensor:
    """The product of a weight's rows and what rank 0 sends: ``[T, n]`` forward, ``[T, K]`` backward."""
    rows, columns = weight_nK.shape
    given = _taken(weight_nK.new_empty(tokens, columns if kind == Order.FORWARD else rows))
    return linear(given, weight_nK) if kind == Order.FORWARD else given @ weight_nK


def _taken(into: torch.Tensor) -> torch.Tensor:
    """The tensor, filled by rank 0."""
    with named(0):
        receive(into, 0, UNBOUNDED)
    return into


def _give(tensor: torch.Tensor) -> None:
    with named(0):
        dist.send(tensor, 0)


def shard_weights(part: Part, layers: Sequence[str], ranks: Ranks) -> None:
    """Replace these layers of a part, in place; adapters on them stay as they are.

    Args:
        layers: ``Part.plain_layers`` of the part as it was loaded with the share of rank 0.
    """
    for number, name in enumerate(layers):
        part.replace_layer(name, partial(ShardedLinear, number=number, ranks=ranks))


class ShardedLinear(nn.Module):
    """A frozen linear layer of which several ranks hold rows.

    Args:
        layer: the layer with its number of outputs, and rank 0's rows as its weight. Its bias is whole.
        number: what the ranks know the layer by.
    """

    def __init__(self, layer: nn.Linear, number: int, ranks: Ranks) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        """Rank 0's rows ``[n, K]``; ``[N]``."""
        self.number, self.ranks = number, ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's result, ``[…, N]``."""
        x_TK = x.reshape(-1, self.in_features)
        if x.requires_grad and torch.is_grad_enabled():
            y_TN: torch.Tensor = _Product.apply(x_TK, self)  # type: ignore[no-untyped-call]
        else:
            y_TN = self.ranks.multiply(self.number, x_TK, self.weight, self.out_features)
        y = y_TN.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """Input times weight; the weight has no gradient."""

    @staticmethod
    def forward(ctx: Any, x_TK: torch.Tensor, layer: ShardedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.ranks.multiply(layer.number, x_TK, layer.weight, layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TN: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer: ShardedLinear = ctx.layer
        return layer.ranks.multiply_back(layer.number, gradient_TN, layer.weight), None
