"""A stage: the blocks of a trunk that one of several processes holds, with what its passes keep there.

It computes with the part as the trunk would alone, but only through its own blocks: weights, KV caches, and the graphs
of passes whose backwards have not come yet are here, adapters and optimizer are rank 0's.

Shapes: T tokens, D the model's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part
from isthmus.model.share import BlockShare
from isthmus.recipe import Recipe
from isthmus.trunk.grouped_lora import Adapter
from isthmus.trunk.loading import load_trunk
from isthmus.trunk.packed_attention import SequenceCache
from isthmus.trunk.ranks import Order, OrderReply, OrderWords, TensorSequence
from isthmus.trunk.runner import Runner
from isthmus.trunk.stash import SavedBytes


def load_stage(checkpoint: Checkpoint, recipe: Recipe, device: torch.device, share: BlockShare, cut: Cut) -> Stage:
    """A rank's stage of the trunk of a cut.

    Raises:
        CutError, ModelError, NotSupportedError: as ``load_trunk``.
    """
    return Stage(Runner(load_trunk(checkpoint, cut, recipe, device, share), record=False))


def stage_adapter(part: Part, blocks: range) -> dict[str, torch.nn.Parameter]:
    """The adapter parameters of these blocks of a part, by uncut name, sorted by name."""
    found = adapters.adapter_parameters(part)
    inside = {name: adapters.block_of(part, name) for name in found}
    return {
        name: found[name]
        for name, block in sorted(inside.items())
        if block is not None and block - part.first_block in blocks
    }


@dataclass(frozen=True)
class Graph:
    """A pass that waits for its backward."""

    h_TD: torch.Tensor
    leaves: list[torch.Tensor]
    """The trained adapter tensors of each segment."""
    output_TD: torch.Tensor


class Stage:
    """The blocks of one rank.

    Args:
        runner: of the trunk's part, of which the rank's blocks alone have weights.
    """

    def __init__(self, runner: Runner) -> None:
        assert runner.part.here is not None
        self._runner = runner
        self._own = stage_adapter(runner.part, runner.part.here)
        self._caches: dict[int, SequenceCache] = {}
        self._graphs: dict[int, Graph] = {}

    def answer(self, words: OrderWords, tensors: TensorSequence) -> OrderReply:
        """The answer to an order.

        Raises:
            RuntimeError: it cannot be computed, for want of memory (``torch.OutOfMemoryError``) or otherwise.
        """
        self._tidy(words["tidy"])
        if words["order"] == Order.BACKWARD:
            return self._backward(words, tensors)
        given = iter(tensors)
        h_TD = next(given)
        if words["own"]:
            adapters.load_adapter(self._runner.part, {name: next(given) for name in self._own})
        return (self._cached if words["order"] == Order.CACHED else self._full)(words, h_TD, given)

    def _tidy(self, changes: Sequence[Sequence[Any]]) -> None:
        """Copy caches, and free caches and graphs, as rank 0 has done since its last order. A copy that finds no memory
        is missed when it is used."""
        for what, number, *other in changes:
            if what == "copy" and number in self._caches:  # else nothing has been cached yet
                with suppress(MemoryError, torch.OutOfMemoryError):
                    self._caches[other[0]] = self._caches[number].copy()
            if what == "cache":
                self._caches.pop(number, None)
            if what == "graph":
                self._graphs.pop(number, None)

    @torch.inference_mode()
    def _cached(self, words: OrderWords, h_TD: torch.Tensor, _: Iterator[torch.Tensor]) -> OrderReply:
        caches = []
        for number, past, blocks in zip(words["caches"], words["past"], words["passed"], strict=True):
            cache = self._caches.get(number) or self._runner.cache_of(range(*blocks))
            self._caches[number] = cache
            cache.crop(past)
            if not cache.blocks:  # its passes came here only with those of others
                cache.reserve(past)
                cache.length = past
            if cache.length != past:
                raise RuntimeError(f"cached positions are gone: {past} are needed, {cache.length} are here")
            caches.append(cache)
        return {}, [self._runner.cached_pass(h_TD, words["lengths"], caches, words["ends"])]

    def _full(self, words: OrderWords, h_TD: torch.Tensor, given: Iterator[torch.Tensor]) -> OrderReply:
        passed = [range(*blocks) for blocks in words["passed"]]
        if words["segments"] is None:
            with torch.inference_mode():
                return {}, [self._runner.full_pass(h_TD, words["lengths"], None, (), passed)]
        segments = [(tokens, self._adapter(own, given)) for tokens, own in words["segments"]]
        h_TD.requires_grad_()
        leaves = [one for _, adapter in segments for one in adapter.values() if one.requires_grad]
        known = chain(self._runner.part.parameters(), self._runner.part.buffers(), leaves, [h_TD])
        saved = SavedBytes(known)
        with torch.enable_grad(), saved:
            output_TD = self._runner.full_pass(h_TD, words["lengths"], segments, words["masks"], passed)
        self._graphs[words["number"]] = Graph(h_TD, leaves, output_TD)
        return {"bytes": saved.nbytes + h_TD.nbytes}, [output_TD.detach()]

    def _adapter(self, own: bool, given: Iterator[torch.Tensor]) -> Adapter:
        """A segment's adapter, its trained tensors as new leaves: this rank's own values, or what is given."""
        return {
            name: (one.detach() if own else next(given)).requires_grad_() if one.requires_grad else one
            for name, one in self._own.items()
        }

    def _backward(self, words: OrderWords, tensors: TensorSequence) -> OrderReply:
        graph = self._graphs.pop(words["number"])
        # in this thread, as on rank 0
        with torch.autograd.set_multithreading_enabled(False):
            h_gradient_TD, *found = torch.autograd.grad(
                graph.output_TD,
                [graph.h_TD, *graph.leaves],
                tensors[0],
                allow_unused=True,  # adapters of blocks that no sequence passes have the gradient 0
                materialize_grads=True,
            )
        flat = [torch.cat([one.flatten() for one in found])] if found else []
        return {}, [h_gradient_TD, *flat]
