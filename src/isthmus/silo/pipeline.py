"""A training step in micro-batches, several of them under way at once: latency and the two sides' work overlap.

While one crosses or the trunk computes it, bottom or top computes another; the sum of gradients is the same.

Shapes: B rows, L positions, T tokens that cross, D the model's width, W what
crosses of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from isthmus.data.tokens import Batch
from isthmus.model.crossing import before_last, crossing, wanted
from isthmus.model.packing import Packing
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.flight import Flight
from isthmus.silo.remote import RemoteTrunk
from isthmus.silo.trainer import Step


@dataclass
class MicroBatch:
    """One micro-batch and how far it has come."""

    batch: Batch
    h_BLD: torch.Tensor | None
    """Bottom's result; None where bottom did not run again."""
    leaf_BLD: torch.Tensor | None
    """The same, cut off, as the residual path takes it to top."""
    h_TW: torch.Tensor | None
    """What of it crossed."""
    packing: Packing
    flight: Flight


def pipelined_step(model: SplitForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, micro_batches: int) -> Step:
    """As ``trainer.train_step``, with the batch's rows in this many micro-batches (or one a row, if rows are fewer)."""
    trunk = model.trunk
    assert isinstance(trunk, RemoteTrunk)
    started = time.perf_counter()
    optimizer.zero_grad()
    sent = [_send(model, trunk, part, part.supervised / batch.supervised) for part in batch.parts(micro_batches)]
    losses = [_turn(model, trunk, part, part.batch.supervised / batch.supervised) for part in sent]
    for part in sent:
        _return(part, trunk.land(part.flight) if trunk.returns(part.h_TW) else None)
    optimizer.step()
    return Step(sum(losses), batch.supervised, batch.tokens, time.perf_counter() - started)


def _send(model: SplitForCausalLM, trunk: RemoteTrunk, batch: Batch, share: float) -> MicroBatch:
    """Through bottom, where that is not done once for all, and off to the trunk.

    Args:
        share: of the step's supervised tokens that are this part's.
    """
    real_BL = batch.attention_mask.bool()
    crosses_BL = crossing(real_BL, model.tail, None, batch.targets)
    packing = Packing(crosses_BL)
    rows = Packing(before_last(real_BL, crosses_BL)).rows(batch.input_ids)
    if trunk.releases_once and not model.residual:
        flight = trunk.start_rows(rows, packing.lengths, train=trunk.returns(None))
        return MicroBatch(batch, None, None, None, packing, flight)
    h_BLD = model.through_bottom(None, input_ids=batch.input_ids, use_cache=False, **_masks(batch))
    targets_BL = wanted(real_BL, None, batch.targets)
    if model.guard is not None and targets_BL is not None:
        h_BLD = model.guard(h_BLD, packing, rows, targets_BL[crosses_BL], share)
    h_TW = trunk.narrow(packing.pack(h_BLD), packing.lengths, rows)
    if trunk.releases_once:
        flight = trunk.start_rows(rows, packing.lengths, train=trunk.returns(h_TW))
    else:
        flight = trunk.start_forward(h_TW, packing.lengths, rows, train=trunk.returns(h_TW))
    leaf_BLD = h_BLD.detach().requires_grad_(h_BLD.requires_grad) if model.residual else None
    return MicroBatch(batch, h_BLD, leaf_BLD, h_TW, packing, flight)


def _turn(model: SplitForCausalLM, trunk: RemoteTrunk, part: MicroBatch, share: float) -> float:
    """Through top to the loss and back, and the gradient off to the trunk; returns this part's share of the loss."""
    arrived = trunk.land(part.flight)
    assert arrived is not None
    arrived_TD = arrived.requires_grad_(trunk.gradients)
    own_TD = arrived_TD if part.leaf_BLD is None else part.packing.pack(part.leaf_BLD)
    g_TD = trunk.join(own_TD, arrived_TD, part.flight.noise_TW)
    g_BLD = part.packing.unpack(g_TD, part.leaf_BLD)
    supervision, shared = part.batch.supervision(), {**_masks(part.batch), "use_cache": False}
    g_BLD, shared = model.for_top(g_BLD, part.packing.real_BL, None, supervision["logits_to_keep"], shared)
    output = model.top.model(inputs_embeds=g_BLD, **supervision, **shared)
    loss: torch.Tensor = output.loss * share
    loss.backward()  # type: ignore[no-untyped-call]
    if trunk.returns(part.h_TW):
        assert arrived_TD.grad is not None
        wanted = part.h_TW is not None and part.h_TW.requires_grad
        part.flight = trunk.start_backward(part.flight, arrived_TD.grad, reply=wanted)
    return float(loss.detach())


def _return(part: MicroBatch, gradient_TW: torch.Tensor | None) -> None:
    """Bottom's gradients: of what crossed, and of the residual path."""
    ways = ((part.h_TW, gradient_TW), (part.h_BLD, None if part.leaf_BLD is None else part.leaf_BLD.grad))
    given = [(state, gradient) for state, gradient in ways if state is not None and gradient is not None]
    if given:
        torch.autograd.backward([state for state, _ in given], [gradient for _, gradient in given])


def _masks(batch: Batch) -> dict[str, Any]:
    return {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
