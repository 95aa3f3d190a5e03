"""A training step in micro-batches, several of them under way at once: latency and the two sides' work overlap.

While one crosses or the trunk computes it, bottom or top computes another; the sum of gradients is the same.

Shapes: B rows, L positions, T tokens that cross, D the model's width, W numbers that cross of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from isthmus.data.tokens import Batch
from isthmus.model.crossing import Outbound
from isthmus.model.split import Reply, SplitForCausalLM
from isthmus.silo.remote import PendingStep, RemoteTrunk
from isthmus.silo.trainer import Step


@dataclass
class MicroBatch:
    """One micro-batch and how far it has come."""

    batch: Batch
    share: float
    """Of the step's supervised tokens that are this part's."""
    outbound: Outbound
    leaf_BLD: torch.Tensor | None
    """Bottom's result cut off from its graph, as a residual path takes it to top; None without one."""
    pending: PendingStep


def pipelined_step(model: SplitForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, micro_batches: int) -> Step:
    """As ``trainer.train_step``, with the batch's rows in this many micro-batches (or one a row, if rows are fewer)."""
    trunk = model.trunk
    assert isinstance(trunk, RemoteTrunk)
    started = time.perf_counter()
    optimizer.zero_grad()
    parts = [_send(model, trunk, part, part.supervised / batch.supervised) for part in batch.parts(micro_batches)]
    losses = [_turn(model, trunk, part) for part in parts]
    for part in parts:
        _return(part, trunk.receive(part.pending) if trunk.wants_gradient(part.outbound) else None)
    optimizer.step()
    return Step(sum(losses), batch.supervised, batch.tokens, time.perf_counter() - started)


def _send(model: SplitForCausalLM, trunk: RemoteTrunk, batch: Batch, share: float) -> MicroBatch:
    """Through bottom, where that is not done once for all, and off to the trunk."""
    outbound = model.outbound(batch.input_ids, batch.places(), batch.supervision(), share=share)
    h_BLD = outbound.h_BLD
    leaf_BLD = h_BLD.detach().requires_grad_(h_BLD.requires_grad) if model.residual and h_BLD is not None else None
    pending = trunk.send(outbound, train=trunk.wants_gradient(outbound))
    return MicroBatch(batch, share, outbound, leaf_BLD, pending)


def _turn(model: SplitForCausalLM, trunk: RemoteTrunk, part: MicroBatch) -> float:
    """Through top to the loss and back, and the gradient off to the trunk; returns this part's share of the loss."""
    arrived_TD = trunk.receive(part.pending)
    assert arrived_TD is not None
    arrived_TD.requires_grad_(trunk.gradients)
    cut_off = replace(part.outbound, h_BLD=part.leaf_BLD)
    output = model.inbound(cut_off, Reply(arrived_TD, part.pending.noise_TW), part.batch.supervision())
    loss: torch.Tensor = output.loss * part.share
    loss.backward()  # type: ignore[no-untyped-call]
    if trunk.wants_gradient(part.outbound):
        assert arrived_TD.grad is not None
        h_TW = part.outbound.h_TW
        reply = h_TW is not None and h_TW.requires_grad
        part.pending = trunk.send_gradient(part.pending, arrived_TD.grad, reply=reply)
    return float(loss.detach())


def _return(part: MicroBatch, gradient_TW: torch.Tensor | None) -> None:
    """Bottom's gradients: of the hidden states that crossed, and of the residual path."""
    residual = None if part.leaf_BLD is None else part.leaf_BLD.grad
    pairs = ((part.outbound.h_TW, gradient_TW), (part.outbound.h_BLD, residual))
    given = [(state, gradient) for state, gradient in pairs if state is not None and gradient is not None]
    if given:
        torch.autograd.backward([state for state, _ in given], [gradient for _, gradient in given])
