"""A top that is told its own silo's noise learns through more of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import fmean

import torch

from isthmus.silo.data import batches, collate
from isthmus.silo.trainer import train_step
from tests.conftest import make_recipe, save_tiny_model
from tests.unit.silo.parties import Party
from tests.unit.silo.test_guard import rows_of

STEPS = 150


def final_loss(model: Path, folder: Path, *, denoise: bool) -> float:
    """Of the last steps' mean, under noise of three times the activations' scale."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    recipe = make_recipe(
        model,
        model={"bottom": 2, "top": 1},
        lora={"rank": 16, "alpha": 32.0, "targets": targets},
        boundary={"denoise": denoise, "forward": {"noise": 3.0}},
        train={"steps": STEPS},
    )
    party, losses = Party(recipe, folder), []
    optimizer = torch.optim.AdamW([p for p in party.silo.model.parameters() if p.requires_grad], lr=3e-3)
    party.trunk.begin(1, ["a"])
    for number, rows in enumerate(itertools.islice(batches(rows_of(0, 256), 32, "train"), STEPS), 1):
        step = train_step(party.silo.model, optimizer, collate(rows, 0))
        party.trunk.commit(1, number, step.weight)
        losses.append(step.loss)
    party.service.stop()
    return fmean(one for one in losses[-30:] if one is not None)


def test_it_learns_more_under_strong_noise(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", initializer_range=0.3)
    told, untold = (final_loss(model, tmp_path / f"{denoise}", denoise=denoise) for denoise in (True, False))
    assert told < 0.8 * untold
