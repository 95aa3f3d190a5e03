"""Training and evaluation on one silo's rows, of a split or an uncut model.

Shapes: B rows, C choices.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Batch, Tokens, collate
from isthmus.model.crossing import IGNORED
from isthmus.model.split import SplitForCausalLM


@dataclass(frozen=True)
class Step:
    """The result of one optimizer step."""

    loss: float | None
    """Summed loss divided by ``weight``; None if all rows were skipped."""
    weight: int
    """Number of tokens of the answers, with their filler."""
    tokens: int
    """Number of tokens without padding."""
    seconds: float
    """Wall time."""
    skipped: int = 0
    """Number of rows skipped because their record's privacy budget is spent."""


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Batch) -> Step:
    """One forward, backward and optimizer step on the batch's loss, the mean over the tokens of ``batch.weight``."""
    started = time.perf_counter()
    optimizer.zero_grad()
    loss = answer_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return Step(float(loss.detach()), batch.weight, batch.tokens, time.perf_counter() - started)


def answer_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The batch's loss, differentiable; of a split model without all logits."""
    skipped = {"skip_logits": True} if isinstance(model, SplitForCausalLM) else {}
    loss: torch.Tensor = model(**batch.inputs(), **skipped, use_cache=False).loss
    return loss


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, data: SiloData, rows: list[Tokens] | None = None, *, size: int = 16
) -> dict[str, float]:
    """Scores on held-out rows: ``accuracy`` (0 to 1) if rows have choices, otherwise ``loss`` and ``perplexity``.

    The loss is the mean per supervised token, in nats. The model is left in eval mode.

    Args:
        rows: the rows to evaluate; None: all held-out rows of ``data``.
        size: rows per batch.
    """
    model.eval()
    rows = sorted(data.held_out if rows is None else rows, key=lambda row: len(row.input))  # little padding in a batch
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    return _accuracy(model, data, chunks, size) if all(map(data.choices_of, rows)) else _loss(model, data, chunks)


def _accuracy(model: PreTrainedModel, data: SiloData, chunks: list[list[Tokens]], size: int) -> dict[str, float]:
    right: list[bool] = []
    for rows in chunks:
        short = all(len(choice) == 1 for row in rows for choice in data.choices_of(row))
        guess = _best_token(model, data, rows) if short else _best_text(model, data, rows, size)
        for row, number in zip(rows, guess, strict=True):
            right.append(data.choices_of(row)[number] in (row.right or (tuple(row.answer),)))
    return {"accuracy": sum(right) / len(right)}


def _best_token(model: PreTrainedModel, data: SiloData, rows: list[Tokens]) -> list[int]:
    """The likeliest choice after each prompt, where every choice is one token."""
    batch = collate([Tokens(row.prompt, []) for row in rows], data.pad).to(model.device)
    logits_BV = model(**batch.unsupervised(), use_cache=False).logits[:, -1]
    return [
        int(logits_V[[choice[0] for choice in data.choices_of(row)]].argmax())
        for logits_V, row in zip(logits_BV, rows, strict=True)
    ]


def _best_text(model: PreTrainedModel, data: SiloData, rows: list[Tokens], size: int) -> list[int]:
    """The choice with the greatest total log-probability after each prompt."""
    asked = [Tokens(row.prompt, list(choice)) for row in rows for choice in data.choices_of(row)]
    scores: list[float] = []
    for start in range(0, len(asked), size):
        batch = collate(asked[start : start + size], data.pad).to(model.device)
        logits = model(**batch.inputs(), use_cache=False).logits.log_softmax(dim=-1)
        targets = batch.targets.unsqueeze(2)
        picked = logits.gather(2, targets.clamp_min(0)).masked_fill(targets == IGNORED, 0.0)
        scores += picked.sum(dim=(1, 2)).tolist()
    numbers, start = [], 0
    for row in rows:
        own = scores[start : start + len(data.choices_of(row))]
        numbers.append(max(range(len(own)), key=own.__getitem__))
        start += len(own)
    return numbers


def _loss(model: PreTrainedModel, data: SiloData, chunks: list[list[Tokens]]) -> dict[str, float]:
    total, weight = 0.0, 0
    for rows in chunks:
        batch = collate(rows, data.pad).to(model.device)
        total += float(answer_loss(model, batch)) * batch.weight
        weight += batch.supervised
    return {"loss": total / weight, "perplexity": math.exp(min(total / weight, 50.0))}
