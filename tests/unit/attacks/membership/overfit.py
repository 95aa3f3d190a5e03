"""A tiny uncut model trained on few rows, for the attacks on what was trained."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from isthmus.attacks.membership.inference import row_losses
from tests.conftest import uncut


def trained(folder: Path, texts: list[list[int]], *, steps: int, noise: float = 0.0) -> PreTrainedModel:
    """The model after some steps on these rows of equal length; noise is a multiple of each gradient's own size."""
    model, ids = uncut(folder), torch.tensor(texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter in model.parameters():
            if noise and parameter.grad is not None:
                size = parameter.grad.square().mean().sqrt()
                parameter.grad += noise * size * torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    return model


@torch.no_grad()
def losses(model: PreTrainedModel, texts: list[list[int]]) -> list[float]:
    ids = torch.tensor(texts)
    found: list[float] = row_losses(model(input_ids=ids).logits, ids).tolist()
    return found
