"""The demo's own steps, on a tiny model in place of the real one: federation, baselines, table, prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from isthmus.demo import play as demo
from isthmus.recipe import Recipe
from tests.conftest import save_tiny_model, write_rows
from tests.integration.processes import Ended, call, processes_of, train_here

pytestmark = pytest.mark.process
SILOS = ("movies", "editorials", "tweets", "products")
WORDS = {"w58": "w10 w11 w12", "w59": "w20 w21 w22"}
"""Texts by label."""


def tiny_recipe(folder: Path, *, quick: bool, seed: int) -> Recipe:
    """The demo's recipe with a tiny model and made-up rows."""
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model("llama", folder / "model"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder / "model")
    rows = [{"text": f"{WORDS[label]} w{number}", "label": label} for number in range(30, 36) for label in WORDS]
    files = {name: str(write_rows(folder / f"{name}.jsonl", rows)) for name in SILOS}
    return Recipe.of(
        {
            "seed": seed,
            "threads": 1,
            "model": {"path": str(folder / "model"), "bottom": 1, "top": 1},
            "train": {"rounds": 1 if quick else 2, "steps": 3, "batch": 2, "learning_rate": 1e-2},
            "task": {"prompt": "{text}", "answer": "{label}", "choices": list(WORDS)},
            "silo": [{"name": name, "train": files[name], "held_out": files[name]} for name in SILOS],
        }
    )


@pytest.fixture
def played(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Ended:
    monkeypatch.setattr(demo, "demo_recipe", tiny_recipe)
    monkeypatch.setenv("COLUMNS", "160")
    if "--quick" not in request.param:  # one demo of real processes is enough
        monkeypatch.setattr(demo, "run_with_progress", lambda run, console: train_here(run))
    ended = call(capsys, monkeypatch, "demo", "--run-dir", tmp_path / "run", "--cache", tmp_path, *request.param)
    ended.succeeded()
    assert not processes_of(tmp_path / "run")
    return ended


@pytest.mark.parametrize("played", [[]], indirect=True)
def test_demo_prints_and_records_its_table(played: Ended, tmp_path: Path) -> None:
    told = json.loads((tmp_path / "run" / "demo.json").read_text())
    assert list(told["accuracy"]) == ["majority", "zero-shot", "alone", "federation", "pooled, uncut"]
    assert all(list(scores) == list(SILOS) for scores in told["accuracy"].values())
    assert set(told["accuracy"]["majority"].values()) == {0.5}
    assert told["bytes"]["up"] > told["bytes"]["down"] / 2 > 0
    mean = sum(told["accuracy"]["federation"].values()) / len(SILOS)
    (last,) = (line for line in played.out.splitlines() if line.strip("│ ").startswith("mean"))
    assert f"{mean:.1%}" in last
    assert "products alone: round 2/2" in played.out
    assert demo.PROMPT in played.out
    assert f"run directory: {tmp_path / 'run'}" in played.out


@pytest.mark.parametrize("played", [["--quick", "--seed", "3"]], indirect=True)
def test_quick_demo_leaves_out_the_baselines(played: Ended, tmp_path: Path) -> None:
    told = json.loads((tmp_path / "run" / "demo.json").read_text())
    assert list(told["accuracy"]) == ["zero-shot", "federation"]
    assert "alone" not in played.out


def test_a_taken_run_directory_is_left_alone(tmp_path: Path) -> None:
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").touch()
    assert demo._free(tmp_path / "run") == tmp_path / "run-3"
