"""What one cut costs and leaks, measured with the silo's own code and a trunk of its own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from isthmus.audit.cut_probe import (
    ATTACKED_ROWS,
    KNOWN_ROWS,
    AttackRows,
    TimedService,
    probe_cut,
    probed_silo,
    seconds_here,
)
from isthmus.engines.zero_trunk import ZeroTrunk
from isthmus.errors import AttackError, CutError
from isthmus.recipe import Recipe
from isthmus.silo.join import load_data
from tests.conftest import make_recipe, write_rows
from tests.integration.processes import rows_of

TASK = {"prompt": "w5 {text}", "answer": " {label}"}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", rows_of("north", 80))


def recipe_of(model: Path, rows: Path, **sections: object) -> Recipe:
    silos = [{"name": name, "train": str(rows)} for name in ("a", "b")]
    train = {"rounds": 1, "steps": 2, "batch": 2, "evaluate": False}
    return make_recipe(model, **{"silo": silos, "task": TASK, "train": train, **sections})


def test_figures_come_one_after_the_other_and_belong_to_the_cut(attacked_model: Path, rows: Path) -> None:
    recipe = recipe_of(attacked_model, rows).with_cut(2, 1)
    silo, trunk, leak = probe_cut(recipe, "a", 6, ["linear"], True)
    assert (silo.bottom, silo.top, silo.trunk_step, silo.leakage) == (2, 1, None, None)
    assert silo.memory is not None
    assert silo.silo_step is not None
    assert silo.silo_token is not None
    assert silo.memory > 50 * 2**20
    assert min(silo.silo_step, silo.silo_token) > 0
    assert trunk.trunk_step is not None
    assert trunk.trunk_token is not None
    assert min(trunk.trunk_step, trunk.trunk_token) > 0
    assert leak.leakage is not None
    assert leak.leakage_interval is not None
    assert leak.leakage_interval[0] <= leak.leakage <= leak.leakage_interval[1]
    assert (leak.attack, leak.attacked_rows) == ("linear", 6)
    assert 6 <= leak.known_rows <= 74
    assert leak.memory == silo.memory


def test_bytes_are_those_of_the_hidden_states_and_gradients(attacked_model: Path, rows: Path) -> None:
    """Forward and gradient of the same positions, each with what frames add."""
    recipe = recipe_of(attacked_model, rows)
    with probed_silo(recipe, "a", TimedService(ZeroTrunk(recipe))) as (silo, _, _):
        batch = load_data(recipe, "a", silo).round_batches(1)[0]
    payload = 2 * sum(len(row.input) for row in batch) * 32 * 4
    found = next(probe_cut(recipe, "a", 0, [], False))
    assert payload < found.up < payload + 400
    narrow = recipe_of(attacked_model, rows, boundary={"codec": {"forward_up": "bf16"}})
    assert found.up - next(probe_cut(narrow, "a", 0, [], False)).up == payload // 4


def test_noise_hides_what_crosses(attacked_model: Path, rows: Path) -> None:
    def leakage(noise: float) -> float:
        recipe = recipe_of(attacked_model, rows, boundary={"forward": {"noise": noise}})
        *_, last = probe_cut(recipe, "a", 8, ["matching"], False)
        assert last.leakage is not None
        return last.leakage

    assert leakage(0.0) > 0.8
    assert leakage(1000.0) < 0.3


def test_the_best_attack_counts(attacked_model: Path, rows: Path) -> None:
    *_, last = probe_cut(recipe_of(attacked_model, rows), "a", 4, ["linear", "matching"], False)
    assert last.attack in ("linear", "matching")
    assert last.leakage is not None
    assert last.leakage > 0.9


def test_budgets_are_not_charged(attacked_model: Path, rows: Path) -> None:
    """A budget of less than one release, which would stop a silo at its first step, does not stop a measurement."""
    noised = {path: {"clip": 1.0, "noise": 1.0} for path in ("forward", "gradient", "update")}
    recipe = recipe_of(attacked_model, rows, boundary=noised, privacy={"record_epsilon": 0.001})
    assert next(probe_cut(recipe, "a", 0, [], False)).silo_step


def test_a_recipe_for_inference_only_is_measured_too(attacked_model: Path, rows: Path) -> None:
    recipe = recipe_of(attacked_model, rows, train={"rounds": 0, "batch": 2, "evaluate": False})
    _, found = probe_cut(recipe, "a", 0, [], True)
    assert found.trunk_step
    assert found.trunk_token


def test_rows_are_attacked_or_known_and_never_both(attacked_model: Path, rows: Path) -> None:
    recipe = recipe_of(attacked_model, rows)
    with probed_silo(recipe, "a", TimedService(ZeroTrunk(recipe))) as (silo, _, _):
        data = load_data(recipe, "a", silo)
    own = AttackRows.drawn(recipe, "a", data, None)
    texts = [{tuple(row.input) for row in part} for part in (own.attacked, own.known)]
    assert not texts[0] & texts[1]
    assert len(own.attacked) == ATTACKED_ROWS
    assert len(own.known) <= KNOWN_ROWS
    assert own == AttackRows.drawn(recipe, "a", data, None)
    assert AttackRows.drawn(recipe, "a", data, 0) == AttackRows([], [])
    with pytest.raises(AttackError, match="too few to attack 41") as refused:
        AttackRows.drawn(recipe, "a", data, 41)
    assert "--rows 40" in refused.value.remedy


def test_a_cut_that_does_not_fit_the_model_is_refused(attacked_model: Path, rows: Path) -> None:
    with pytest.raises(CutError, match="does not fit a model of 5 blocks"):
        next(probe_cut(recipe_of(attacked_model, rows).with_cut(3, 2), "a", 0, [], False))


def test_with_one_thread_only_the_processes_own_time_counts() -> None:
    assert torch.get_num_threads() == 1
    started = seconds_here()
    time.sleep(0.5)
    assert seconds_here() - started < 0.4
