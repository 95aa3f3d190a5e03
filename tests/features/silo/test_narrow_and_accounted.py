"""A bottleneck with calibrated noise and budgets: the clip, the noise and the charges are those of what crosses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import BudgetExhausted
from isthmus.model.bottleneck import DOWN, layer_weight, project
from isthmus.privacy.analytic import gaussian_noise
from isthmus.privacy.budget import Budget
from isthmus.privacy.ledger import MemoryLedger
from isthmus.storage.record import RunDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import Split, make_recipe, save_tiny_model
from tests.features.silo.test_spent_budgets import (
    BUDGET,
    CALIBRATED,
    DELTA,
    STEPS,
    charged,
    federate,
    federation_of,
    steps_of,
)
from tests.oracle.twins import ragged

WIDTH = 6
LENGTHS = (3, 40, 23)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def boundary_of(**more: Any) -> dict[str, Any]:
    return {"forward": CALIBRATED, "gradient": CALIBRATED, "width": WIDTH, **more}


def test_the_projection_is_clipped_and_noised_to_what_its_epsilon_asks(
    split: Split, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, sent = MemoryLedger(), []
    model, _ = split(make_recipe(folder, boundary=boundary_of()), ledger=ledger)
    submit = model.trunk.channel.submit
    monkeypatch.setattr(model.trunk.channel, "submit", lambda request: sent.append(request) or submit(request))
    batch = ragged("right", lengths=LENGTHS)
    noise = []
    with torch.no_grad():
        h_BLD = model.bottom.hidden(input_ids=batch["input_ids"], use_cache=False)
        h_TW = project(h_BLD[batch["attention_mask"].bool()], layer_weight(model.bottom, DOWN))
        clipped_TW = torch.cat([one / one.norm().clamp_min(1.0) for one in h_TW.split(LENGTHS)])
        for _ in range(8):
            model(**batch, use_cache=False)
            hidden = sent[-1].hidden
            assert isinstance(sent[-1], pb.Forward)
            came_TW = codec.decode(hidden, rows=sum(LENGTHS), width=WIDTH, codec="fp32")
            noise.append(came_TW - clipped_TW)
    drawn = torch.stack(noise)
    assert drawn.std() == pytest.approx(2 * gaussian_noise(1.0, DELTA), rel=0.06)
    assert abs(float(drawn.mean())) < 0.5
    assert {release.width for release in ledger.releases} == {WIDTH}


@pytest.mark.parametrize(("gradients", "bears"), [(True, STEPS), (False, 2 * STEPS)])
def test_a_records_budget_bears_so_many_steps(split: Split, folder: Path, gradients: bool, bears: int) -> None:
    """Without gradients a step costs a record half as much."""
    recipe = make_recipe(
        folder, boundary=boundary_of(residual=True, gradients=gradients), privacy={"record_epsilon": BUDGET}
    )
    ledger = MemoryLedger()
    model, _ = split(recipe, ledger=ledger, budget=Budget(recipe.privacy))
    model.trunk.rounds.begin(1, ["a"])
    batch = ragged("left", lengths=LENGTHS)
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    for _ in range(bears):
        assert model.boundary.affordable(rows, list(LENGTHS)) == [True] * 3
        model(**batch).loss.backward()
    assert model.boundary.affordable(rows, list(LENGTHS)) == [False] * 3
    with pytest.raises(BudgetExhausted):
        model(**batch)
    charges = Counter(charge.record for release in ledger.releases for charge in release.charges)
    assert list(charges.values()) == [2 * STEPS] * 3
    assert {release.path: release.width for release in ledger.releases} == {
        "forward": WIDTH,
        **({"gradient": 32} if gradients else {}),
    }


@pytest.mark.parametrize(("micro_batches", "adapter"), [(1, "shared"), (2, "replica")])
def test_a_federation_leaves_out_spent_records(folder: Path, tmp_path: Path, micro_batches: int, adapter: str) -> None:
    """As without a bottleneck: what a record costs does not depend on how many numbers cross."""
    recipe = federation_of(
        folder,
        tmp_path,
        {"a": 4, "b": 8},
        boundary=boundary_of(residual=True, tail=1),
        train={"micro_batches": micro_batches},
        trunk={"adapter": adapter},
    )
    run = RunDirectory.create(tmp_path / "run", recipe)
    federate(recipe, run)
    for name, rows, skipped in (("a", 4, 12), ("b", 8, 0)):
        assert sum(line.get("skipped", 0) for line in steps_of(run, name)) == skipped
        counts = charged(run, name)
        assert len(counts["forward"]) == rows
        assert set(counts["forward"].values()) == set(counts["gradient"].values()) == {STEPS}
