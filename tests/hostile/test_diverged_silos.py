"""A silo whose training diverges sends nothing of it, says so, and takes part in the next round."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.recipe import Recipe
from isthmus.silo.worker import Worker
from isthmus.storage.record import RunDirectory
from tests.features.silo.test_error_feedback import ROUNDS, model, play, recipe  # noqa: F401


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_round_leaves_the_adapters_as_they_were(
    recipe: Recipe,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    value: float,
) -> None:
    honest = Worker._change

    def diverged(self: Worker, round: int, *rest: Any) -> dict[str, torch.Tensor]:
        change = honest(self, round, *rest)
        if round == 2:
            next(iter(change.values())).view(-1)[0] = value
        return change

    monkeypatch.setattr(Worker, "_change", diverged)
    run = RunDirectory(tmp_path / "run")
    with caplog.at_level(logging.ERROR):
        play(recipe, run)
    assert "round 2: training diverged" in caplog.text
    after = [run.role("root").load_round(round)["shared"] for round in range(1, ROUNDS + 1)]
    assert all(tensor.isfinite().all() for shared in after for tensor in shared.values())
    assert all(torch.equal(after[0][name], tensor) for name, tensor in after[1].items())
    assert any(not torch.equal(after[1][name], tensor) for name, tensor in after[2].items())
