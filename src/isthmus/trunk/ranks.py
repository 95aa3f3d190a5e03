"""What the processes of a trunk that several hold together say to one another: rank 0, which is the trunk, asks; the
others, each with a stretch of its blocks, answer.

Every message has rank 0 at one end, so that it knows which rank is gone. A message is words, as JSON, and the tensors
that they tell of. Another rank does one thing at a time, and answers each order once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist

from isthmus.errors import RankLostError
from isthmus.model.cut import Cut
from isthmus.model.device import CPU
from isthmus.model.share import BlockShare
from isthmus.trunk.scheduler import ComputeOver

PASS_SECONDS = 900.0
"""Longest time that rank 0 waits for an answer of another rank: a processor may compute for minutes for many silos."""
UNBOUNDED = timedelta(days=3650)
"""For what comes when silos ask for it, and for loading."""
TensorSequence = Sequence[torch.Tensor]
OrderWords = Mapping[str, Any]
OrderReply = tuple[OrderWords, TensorSequence]
AnswersOrders = Callable[[OrderWords, TensorSequence], OrderReply]
"""Answers an order and the tensors that came with it."""


class Order(StrEnum):
    """What rank 0 asks of another rank."""

    LOAD = "load"
    """The rank's blocks of the trunk of this cut: ``bottom``, ``top``."""
    FULL = "full"
    """A pass of whole sequences (``Runner.full_pass``)."""
    CACHED = "cached"
    """A pass of new tokens of cached sequences (``Runner.cached_pass``)."""
    BACKWARD = "backward"
    """The gradients of a pass."""
    END = "end"
    """Nothing more."""


class Ranks:
    """All ranks, as rank 0 has them; torch.distributed has connected them.

    Args:
        count: how many there are, rank 0 included.
    """

    def __init__(self, count: int) -> None:
        self.share = BlockShare(0, count)
        """That of rank 0."""
        self.others = [BlockShare(rank, count) for rank in range(1, count)]
        self._lost: RankLostError | None = None

    def check(self) -> None:
        """Raise ``RankLostError`` if a rank has been lost."""
        if self._lost is not None:
            raise self._lost

    def load(self, cut: Cut) -> None:
        """Have all others load their blocks of the trunk of this cut.

        Raises:
            RankLostError: one is gone.
        """
        for share in self.others:
            with self._noting(share.rank):
                give(share.rank, {"order": Order.LOAD, "bottom": cut.bottom, "top": cut.top})

    def wait_loaded(self) -> None:
        """Wait until all others have loaded what ``load`` asked for.

        Raises:
            RankLostError: one is gone, for want of memory or of a tensor.
        """
        for share in self.others:
            with self._noting(share.rank):
                take(share.rank, UNBOUNDED)

    def ask(
        self, rank: int, words: OrderWords, tensors: TensorSequence, device: torch.device
    ) -> tuple[OrderWords, list[torch.Tensor]]:
        """A rank's answer to an order.

        Args:
            device: where the answer's tensors are to be.

        Raises:
            ComputeOver: the rank is gone.
            torch.OutOfMemoryError: it has no memory for this.
            RuntimeError: it failed otherwise.
        """
        try:
            with self._noting(rank):
                give(rank, words, tensors, timedelta(seconds=PASS_SECONDS))
                answer, found = take(rank, timedelta(seconds=PASS_SECONDS), device)
        except RankLostError as lost:  # ends the compute thread: no silo is answered with an error
            raise ComputeOver(lost) from lost
        if "error" in answer:
            kind = torch.OutOfMemoryError if answer["memory"] else RuntimeError
            raise kind(f"rank {rank}: {answer['error']}")
        return answer, found

    def end(self) -> None:
        """Have all others end; one that is gone is noted for ``check``. The compute thread must have ended."""
        if self._lost is not None:
            return
        for share in self.others:
            try:
                with self._noting(share.rank):
                    give(share.rank, {"order": Order.END}, patience=timedelta(seconds=PASS_SECONDS))
            except RankLostError:
                return

    @contextmanager
    def _noting(self, rank: int) -> Iterator[None]:
        """Note the rank as lost where the block fails."""
        try:
            yield
        except RankLostError as lost:
            self._lost = lost
            raise


def follow(load: Callable[[Cut], AnswersOrders], device: torch.device) -> None:
    """Do what rank 0 asks for, until it ends.

    Args:
        load: loads this rank's blocks of the trunk of a cut; gives what answers orders about them.
        device: where this rank computes.

    Raises:
        RankLostError: rank 0 is gone.
    """
    answer: AnswersOrders | None = None
    while True:
        words, tensors = take(0, UNBOUNDED, device)
        if words["order"] == Order.END:
            return
        if words["order"] == Order.LOAD:
            answer = None  # the blocks of the cut before make room
            answer = load(Cut(words["bottom"], words["top"]))
            give(0, {})
            continue
        assert answer is not None
        try:
            reply = answer(words, tensors)
        except Exception as error:  # the request's, as on rank 0
            lack = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            reply = {"error": str(error) or type(error).__name__, "memory": lack}, ()
        give(0, *reply)


def give(rank: int, words: OrderWords, tensors: TensorSequence = (), patience: timedelta = UNBOUNDED) -> None:
    """Send words and tensors.

    Args:
        patience: longest time until the rank takes each message.

    Raises:
        RankLostError: the rank is gone, or takes nothing for so long.
    """
    sizes = [[str(one.dtype).removeprefix("torch."), *one.shape] for one in tensors]
    text = torch.frombuffer(bytearray(json.dumps([words, sizes]).encode()), dtype=torch.uint8)
    messages = [one.detach().contiguous() for one in (torch.tensor([len(text)]), text, *tensors) if one.numel()]
    with named(rank):
        for work in [_pending(dist.isend(message, rank)) for message in messages]:
            work.wait(patience)


def take(rank: int, patience: timedelta, device: torch.device = CPU) -> tuple[OrderWords, list[torch.Tensor]]:
    """The words and tensors that this rank sends.

    Args:
        patience: longest time to wait for each message.
        device: where the tensors are to be.

    Raises:
        RankLostError: it is gone, or sends nothing for so long (of CUDA tensors, torch ends the process then).
    """
    with named(rank):
        size = _received(torch.empty(1, dtype=torch.long), rank, patience)
        text = _received(torch.empty(int(size), dtype=torch.uint8), rank, patience)
        words, sizes = json.loads(bytes(text.tolist()))
        empty = [torch.empty(shape, dtype=getattr(torch, dtype), device=device) for dtype, *shape in sizes]
        return words, [_received(one, rank, patience) if one.numel() else one for one in empty]


def _received(into: torch.Tensor, rank: int, patience: timedelta) -> torch.Tensor:
    """The tensor, filled with what this rank sends."""
    _pending(dist.irecv(into, rank)).wait(patience)
    return into


def _pending(work: dist.Work | None) -> dist.Work:
    """The work, which torch.distributed gives to all that belong to a group."""
    assert work is not None
    return work


@contextmanager
def named(rank: int) -> Iterator[None]:
    """Within the block an error of torch.distributed names this rank.

    Raises:
        RankLostError: it is gone, or answers nothing.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            how = f"sends more than there is memory for: {error}"
        elif "timed out" in str(error).lower():
            how = f"does not answer (waited {PASS_SECONDS:g} seconds)"
        else:
            how = "is gone"
        raise RankLostError(
            f"rank {rank}, which holds some of the trunk's blocks, {how}",
            remedy="its own output says why; start all ranks again (torchrun --max-restarts does), and silos go on",
        ) from error
