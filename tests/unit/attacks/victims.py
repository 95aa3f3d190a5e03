"""What a silo's training step lets out, made by the plain parts one row at a time: the obvious oracle of a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part


@dataclass(frozen=True)
class Parts:
    bottom: Part
    trunk: Part
    top: Part


@dataclass(frozen=True)
class Seen:
    """One row as the trunk sees it."""

    g_LD: torch.Tensor
    e_LD: torch.Tensor


def load_parts(folder: Path) -> Parts:
    checkpoint, cut = Checkpoint(str(folder)), Cut(1, 1)
    bottom = load_part(checkpoint, cut, "bottom")
    return Parts(bottom, load_part(checkpoint, cut, "trunk"), load_part(checkpoint, cut, "top", tied=bottom))


def secured(e_LD: torch.Tensor, clip: float, noise: float, draw: torch.Generator) -> torch.Tensor:
    if clip:
        e_LD = torch.stack([row * min(1.0, clip / max(float(row.norm()), 1e-30)) for row in e_LD])
    return e_LD + noise * torch.randn(e_LD.shape, generator=draw)


def step(
    parts: Parts,
    prompt: list[int],
    answer: list[int],
    *,
    weight: float,
    clip: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
    filler: int = 0,
) -> Seen:
    """The trunk's result for one row, with so much filler, and the secured gradient that comes back."""
    ids = torch.tensor([prompt + answer + [0] * filler])
    h_1LD = parts.bottom.hidden(input_ids=ids, use_cache=False)
    g_1LD = parts.trunk.hidden(inputs_embeds=h_1LD, use_cache=False).detach().requires_grad_()
    logits_LV = parts.top.model(inputs_embeds=g_1LD, use_cache=False).logits[0]
    loss = cross_entropy(logits_LV[len(prompt) - 1 :][: len(answer)], torch.tensor(answer), reduction="sum") / weight
    (e_1LD,) = torch.autograd.grad(loss, g_1LD)
    return Seen(g_1LD[0].detach(), secured(e_1LD[0], clip, noise, torch.Generator().manual_seed(seed)))
