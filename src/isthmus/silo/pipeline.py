"""Pipelined training: a step is split into micro-batches that are in flight at once.

While one crosses, or the trunk computes it, bottom or top computes another. The sum of the gradients is that of one
batch.

Shapes: B rows, L positions, T tokens that cross, D the model's width, W the width that crosses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from isthmus.data.tokens import Batch
from isthmus.model.crossing import Outbound, Reply
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.remote import PendingStep, RemoteTrunk
from isthmus.silo.trainer import Step


@dataclass
class MicroBatch:
    """A micro-batch in flight."""

    batch: Batch
    share: float
    """Its share of the step's weight, 0 to 1."""
    outbound: Outbound
    """The batch as it was sent, with the state that the silo keeps."""
    leaf_BLD: torch.Tensor | None
    """Bottom's output detached from its graph, the input of the residual path; None without a residual path."""
    pending: PendingStep
    """The request in flight: the forward, then the backward."""


def pipelined_step(model: SplitForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, micro_batches: int) -> Step:
    """One optimizer step like ``trainer.train_step``, in up to ``micro_batches`` micro-batches of at least one row."""
    trunk = model.trunk
    assert isinstance(trunk, RemoteTrunk)
    started = time.perf_counter()
    optimizer.zero_grad()
    parts = [_send(model, trunk, part, part.weight / batch.weight) for part in batch.parts(micro_batches)]
    losses = [_finish_forward(model, trunk, part) for part in parts]
    for part in parts:
        _finish_backward(part, trunk.receive(part.pending) if trunk.wants_gradient(part.outbound) else None)
    optimizer.step()
    return Step(sum(losses), batch.weight, batch.tokens, time.perf_counter() - started)


def _send(model: SplitForCausalLM, trunk: RemoteTrunk, batch: Batch, share: float) -> MicroBatch:
    """Run bottom on a micro-batch and send its hidden states. Released examples do not need bottom."""
    outbound = model.outbound(batch.input_ids, batch.places(), batch.supervision(), share=share)
    h_BLD = outbound.h_BLD
    leaf_BLD = h_BLD.detach().requires_grad_(h_BLD.requires_grad) if model.residual and h_BLD is not None else None
    pending = trunk.send(outbound, train=trunk.wants_gradient(outbound))
    return MicroBatch(batch, share, outbound, leaf_BLD, pending)


def _finish_forward(model: SplitForCausalLM, trunk: RemoteTrunk, part: MicroBatch) -> float:
    """Receive the trunk's answer, run top forward and backward, send the gradient. Returns the part's share of loss."""
    received_TD = trunk.receive(part.pending)
    assert received_TD is not None
    received_TD.requires_grad_(trunk.gradients)
    detached = replace(part.outbound, h_BLD=part.leaf_BLD)
    head = {**part.batch.supervision(), "skip_logits": True}
    output = model.inbound(detached, Reply(received_TD, part.pending.noise_TW), head)
    assert output.loss is not None
    loss: torch.Tensor = output.loss * part.share
    loss.backward()  # type: ignore[no-untyped-call]
    if trunk.wants_gradient(part.outbound):
        assert received_TD.grad is not None
        h_TW = part.outbound.h_TW
        reply = h_TW is not None and h_TW.requires_grad
        part.pending = trunk.send_gradient(part.pending, received_TD.grad, reply=reply)
    return float(loss.detach())


def _finish_backward(part: MicroBatch, gradient_TW: torch.Tensor | None) -> None:
    """Run bottom's backward from the gradients of the hidden states that crossed and of the residual path."""
    residual = None if part.leaf_BLD is None else part.leaf_BLD.grad
    pairs = ((part.outbound.h_TW, gradient_TW), (part.outbound.h_BLD, residual))
    given = [(state, gradient) for state, gradient in pairs if state is not None and gradient is not None]
    if given:
        torch.autograd.backward([state for state, _ in given], [gradient for _, gradient in given])
