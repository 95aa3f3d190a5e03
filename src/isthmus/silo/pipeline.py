"""A training step in micro-batches, several of them under way at once: latency and the two sides' work overlap.

While one crosses or the trunk computes it, bottom or top computes another; the sum of gradients is the same.

Shapes: B rows, L positions, T real tokens, D width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from isthmus.model.packing import Packing
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.data import Batch
from isthmus.silo.remote import Flight, RemoteTrunk
from isthmus.silo.trainer import Step


@dataclass
class MicroBatch:
    """One micro-batch and how far it has come."""

    batch: Batch
    h_TD: torch.Tensor | None
    """Bottom's result, if it has a gradient to get."""
    packing: Packing
    flight: Flight


def pipelined_step(model: SplitForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, micro_batches: int) -> Step:
    """As ``trainer.train_step``, with the batch's rows in this many micro-batches (or one a row, if rows are fewer)."""
    assert isinstance(model.trunk, RemoteTrunk)
    started = time.perf_counter()
    optimizer.zero_grad()
    sent = [_send(model, model.trunk, part) for part in batch.parts(micro_batches)]
    losses = [_turn(model, model.trunk, part, part.batch.supervised / batch.supervised) for part in sent]
    for part in sent:
        gradient_TD = model.trunk.land(part.flight)
        if gradient_TD is not None and part.h_TD is not None:
            part.h_TD.backward(gradient_TD)  # type: ignore[no-untyped-call]
    optimizer.step()
    return Step(sum(losses), batch.supervised, batch.tokens, time.perf_counter() - started)


def _send(model: SplitForCausalLM, trunk: RemoteTrunk, batch: Batch) -> MicroBatch:
    """Through bottom, where that is not done once for all, and off to the trunk."""
    packing = Packing(batch.attention_mask.bool())
    if trunk.releases_once:
        return MicroBatch(batch, None, packing, trunk.start_rows(packing.rows(batch.input_ids)))
    h_BLD = model.through_bottom(None, input_ids=batch.input_ids, use_cache=False, **_masks(batch))
    h_TD = packing.pack(h_BLD)
    wanted = h_TD if h_TD.requires_grad else None
    return MicroBatch(batch, wanted, packing, trunk.start_forward(h_TD, packing.lengths, packing.rows(batch.input_ids)))


def _turn(model: SplitForCausalLM, trunk: RemoteTrunk, part: MicroBatch, share: float) -> float:
    """Through top to the loss and back, and the gradient off to the trunk; returns this part's share of the loss."""
    arrived = trunk.land(part.flight)
    assert arrived is not None
    arrived_TD = arrived.requires_grad_(True)
    output = model.top.model(
        inputs_embeds=part.packing.unpack(arrived_TD),
        labels=part.batch.labels,
        logits_to_keep=part.batch.keep,
        use_cache=False,
        **_masks(part.batch),
    )
    loss: torch.Tensor = output.loss * share
    loss.backward()  # type: ignore[no-untyped-call]
    assert arrived_TD.grad is not None
    part.flight = trunk.start_backward(part.flight, arrived_TD.grad, reply=part.h_TD is not None)
    return float(loss.detach())


def _masks(batch: Batch) -> dict[str, torch.Tensor]:
    return {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
