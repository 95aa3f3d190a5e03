"""The runner of a trunk whose blocks several processes hold, one stretch after another: rank 0's own, then through each
other rank's (``trunk.stage``).

Each pass goes to a rank and comes back once; weights, KV caches and activations stay where the blocks are. One pass is
under way at a time. Numbers are those of a trunk alone: each block is computed once, by the same operations.

Shapes: T tokens of all sequences, concatenated; D the model's width; W width of the hidden states that cross.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from isthmus.model.cut import Part
from isthmus.trunk.grouped_lora import Adapter
from isthmus.trunk.packed_attention import SequenceCache
from isthmus.trunk.ranks import Order, OrderWords, Ranks, TensorSequence
from isthmus.trunk.runner import Runner
from isthmus.trunk.stage import stage_adapter


class StagedRunner(Runner):
    """Runs the trunk part, of which this process has the weights of rank 0's blocks.

    Args:
        residual, passed: as of ``Runner``.
    """

    def __init__(
        self, part: Part, ranks: Ranks, *, residual: bool = False, passed: Mapping[str, range] | None = None
    ) -> None:
        super().__init__(part, record=False, passed=passed)
        self._whole_residual = residual
        assert part.here is not None
        self._own = part.here
        self._stages = [
            OtherStage(ranks, share.rank, share.blocks(len(self._all)), part, self.device) for share in ranks.others
        ]
        self._numbers = count()

    def full_pass(
        self,
        h_TD: torch.Tensor,
        lengths: list[int],
        segments: list[tuple[int, Adapter]] | None = None,
        masks: Sequence[str | None] = (),
        passed: Sequence[range] = (),
    ) -> torch.Tensor:
        passed = passed or [self._all] * len(lengths)
        with self._groups.through(segments, self.device, masks):
            wide_TD = self._widened(h_TD.to(self.device, self.dtype))
        g_TD = super().full_pass(wide_TD, lengths, segments, masks, _within(passed, self._own))
        self.bytes_elsewhere = 0
        for stage in self._stages:
            inside = _within(passed, stage.blocks)
            if not any(inside):
                continue
            words = {"lengths": lengths, "passed": _ends_of(inside), "masks": list(masks)}
            if segments is None:
                g_TD = stage.full(words, g_TD)
            else:
                g_TD, nbytes = stage.full_with_graph(words, g_TD, segments)
                self.bytes_elsewhere += nbytes
        return g_TD - wide_TD if self._whole_residual else g_TD

    def cached_pass(
        self,
        h_TD: torch.Tensor,
        lengths: list[int],
        caches: list[SequenceCache],
        ends: list[int | None] | None = None,
    ) -> torch.Tensor:
        staged = [cache for cache in caches if isinstance(cache, StagedCache)]
        past, passed = [cache.length for cache in staged], [cache.passed for cache in staged]
        wide_TD = self._widened(h_TD.to(self.device, self.dtype))
        g_TD = super().cached_pass(wide_TD, lengths, caches, ends)
        for stage in self._stages:
            inside = _within(passed, stage.blocks)
            if any(inside):
                words = {"lengths": lengths, "passed": _ends_of(inside), "past": past, "ends": ends}
                g_TD = stage.cached({**words, "caches": [cache.number for cache in staged]}, g_TD)
        return g_TD - wide_TD if self._whole_residual else g_TD

    def cache_of(self, blocks: range) -> SequenceCache:
        return StagedCache(self, blocks)


class StagedCache(SequenceCache):
    """The KV cache of one sequence, spread over the ranks; other ranks know it by its number.

    Args:
        passed: the part's blocks that the sequence passes, by their indices in the part.
    """

    def __init__(self, runner: StagedRunner, passed: range) -> None:
        (own,) = _within([passed], runner._own)
        super().__init__(runner.plan, runner.context, runner.dtype, runner.device, own)
        self.passed = passed
        self._counted = len(passed)
        self._runner = runner
        self._take_number()

    def copy(self) -> SequenceCache:
        twin = super().copy()
        assert isinstance(twin, StagedCache)
        twin._take_number()
        for stage in self._runner._stages:
            stage.tidy.append(("copy", self.number, twin.number))
        return twin

    def _take_number(self) -> None:
        self.number = next(self._runner._numbers)
        for stage in self._runner._stages:
            weakref.finalize(self, stage.tidy.append, ("cache", self.number)).atexit = False


class OtherStage:
    """Another rank's blocks, as rank 0 has them.

    Args:
        blocks: their indices in the part.
        part: rank 0's, which has their adapter, too.
    """

    def __init__(self, ranks: Ranks, rank: int, blocks: range, part: Part, device: torch.device) -> None:
        self.blocks = blocks
        self.tidy: deque[tuple[Any, ...]] = deque()
        """What the rank is to copy and to free before its next order."""
        self._ranks, self._rank, self._device = ranks, rank, device
        self._adapter = stage_adapter(part, blocks)
        self._sent: list[int] | None = None
        """Versions of the adapter's tensors that the rank has."""
        self._numbers = count()

    def full(self, words: OrderWords, h_TD: torch.Tensor) -> torch.Tensor:
        """The result of a pass of whole sequences through the part's own adapter, ``[T, D]``."""
        return self._pass(Order.FULL, {**words, "segments": None}, h_TD)[1]

    def cached(self, words: OrderWords, h_TD: torch.Tensor) -> torch.Tensor:
        """The result of a pass of new tokens of cached sequences, ``[T, D]``."""
        return self._pass(Order.CACHED, words, h_TD)[1]

    def full_with_graph(
        self, words: OrderWords, h_TD: torch.Tensor, segments: Sequence[tuple[int, Adapter]]
    ) -> tuple[torch.Tensor, int]:
        """The result of a pass through these segments' adapters, ``[T, D]``, with a graph; the bytes that it takes
        there."""
        trained = [name for name, one in self._adapter.items() if one.requires_grad]
        leaves = [adapter[name] for _, adapter in segments for name in trained]
        call = _Call(self, words, segments, trained)
        result_TD: torch.Tensor = _StagePass.apply(h_TD, call, *leaves)  # type: ignore[no-untyped-call]
        return result_TD, call.nbytes

    def forward(self, call: _Call, h_TD: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """A pass whose graph the rank keeps: its result, its number and its bytes."""
        number = next(self._numbers)
        shared = [all(self._is_own(name, adapter[name]) for name in call.trained) for _, adapter in call.segments]
        given = [
            adapter[name]
            for (_, adapter), same in zip(call.segments, shared, strict=True)
            for name in (() if same else call.trained)
        ]
        segments = [(tokens, same) for (tokens, _), same in zip(call.segments, shared, strict=True)]
        answer, result_TD = self._pass(Order.FULL, {**call.words, "segments": segments, "number": number}, h_TD, given)
        return result_TD, number, answer["bytes"]

    def backward(self, number: int, gradient_TD: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of a pass's input, and, where adapters train, one tensor of all of theirs."""
        return self._ask(Order.BACKWARD, {"number": number}, [gradient_TD])[1]

    def _ask(self, order: Order, words: OrderWords, tensors: TensorSequence) -> tuple[OrderWords, list[torch.Tensor]]:
        tidy = [self.tidy.popleft() for _ in range(len(self.tidy))]  # others may be added meanwhile, by any thread
        return self._ranks.ask(self._rank, {**words, "order": order, "tidy": tidy}, tensors, self._device)

    def _pass(
        self, order: Order, words: OrderWords, h_TD: torch.Tensor, given: TensorSequence = ()
    ) -> tuple[OrderWords, torch.Tensor]:
        """The rank's answer about a pass, and its result. The part's own adapter of these blocks goes along if it has
        changed since the rank got it."""
        versions = [one._version for one in self._adapter.values()]
        own = () if versions == self._sent else self._adapter.values()
        answer, found = self._ask(order, {**words, "own": bool(own)}, [h_TD, *own, *given])
        self._sent = versions
        return answer, found[0]

    def _is_own(self, name: str, tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() == self._adapter[name].data_ptr()


class _Call:
    """What a pass with a graph is asked with. It lives as long as the graph on this side."""

    def __init__(
        self, stage: OtherStage, words: OrderWords, segments: Sequence[tuple[int, Adapter]], trained: Sequence[str]
    ) -> None:
        self.stage, self.words, self.segments, self.trained = stage, words, segments, trained
        self.number, self.nbytes = -1, 0


class _StagePass(torch.autograd.Function):
    """A pass through another rank's blocks, whose graph is there."""

    @staticmethod
    def forward(ctx: Any, h_TD: torch.Tensor, call: _Call, *leaves: torch.Tensor) -> torch.Tensor:
        result_TD, call.number, call.nbytes = call.stage.forward(call, h_TD)
        weakref.finalize(call, call.stage.tidy.append, ("graph", call.number)).atexit = False
        ctx.call, ctx.shapes = call, [one.shape for one in leaves]
        return result_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: _Call = ctx.call
        h_gradient_TD, *flat = call.stage.backward(call.number, gradient_TD)
        sizes = [shape.numel() for shape in ctx.shapes]
        pieces = torch.split(flat[0], sizes) if flat else ()
        found = [piece.view(shape) for piece, shape in zip(pieces, ctx.shapes, strict=True)]
        return h_gradient_TD, None, *found


def _within(passed: Sequence[range], blocks: range) -> list[range]:
    """What of these ranges lies in the blocks; where nothing does, an empty range."""
    found = []
    for one in passed:
        start, stop = max(one.start, blocks.start), min(one.stop, blocks.stop)
        found.append(range(start, stop) if start < stop else range(0))
    return found


def _ends_of(ranges: Sequence[range]) -> list[tuple[int, int]]:
    return [(one.start, one.stop) for one in ranges]
