"""A whole federation by ``isthmus run``: what it leaves, and what its model answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

import isthmus
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from tests.conftest import uncut
from tests.integration.processes import (
    Command,
    assert_no_traceback,
    call,
    processes_of,
    rows_of,
    steps_of,
    write_federation,
)
from tests.oracle.twins import ragged

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
ROUNDS, STEPS = 5, 40


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> tuple[Path, str]:
    """A run that nothing happened to, and what it printed: what every resumed run must equal."""
    run = recipe.parent / "undisturbed"
    command = Command(recipe.parent, "run", recipe, "--run-dir", run)
    try:
        ended = command.wait()
    finally:
        command.end()
    ended.succeeded()
    return run, ended.out


def test_run_directory_holds_what_the_run_did(undisturbed: tuple[Path, str], recipe: Path) -> None:
    run, printed = undisturbed
    assert Recipe.read(run / "recipe.toml").train == Recipe.read(recipe).train
    for silo in ("north", "south"):
        assert steps_of(run, silo) == [(r, s) for r in range(1, ROUNDS + 1) for s in range(1, STEPS + 1)]
        paths = [release.path for release in read_ledger(run / "silos" / silo / "ledger.jsonl").releases()]
        assert paths.count("update") == ROUNDS
        assert paths.count("gradient") == ROUNDS * STEPS
        assert RunDirectory.open(run).role(silo).rounds() == set(range(1, ROUNDS + 1))
    measured = [line for line in read_journal(run / "silos/north/metrics.jsonl") if line["event"] == "evaluation"]
    assert [line["round"] for line in measured] == list(range(ROUNDS + 1))
    assert measured[-1]["loss"] < measured[0]["loss"]
    assert [line["round"] for line in read_journal(run / "root/metrics.jsonl")] == list(range(1, ROUNDS + 1))
    assert all(line["silos"] == ["north", "south"] for line in read_journal(run / "trunk/metrics.jsonl"))
    assert {log.name for log in (run / "logs").iterdir()} == {"trunk.log", "north.log", "south.log"}
    assert f"run directory: {run}" in printed.splitlines()
    assert f"next: isthmus generate {run} PROMPT" in printed
    assert f"{ROUNDS * STEPS}/{ROUNDS * STEPS}" in printed
    assert "privacy spent, epsilon at delta 1e-05" in printed
    assert_no_traceback(run)
    assert not processes_of(run)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
def test_exported_adapter_on_the_uncut_model_answers_as_the_split_model(
    undisturbed: tuple[Path, str],
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = undisturbed
    prompt = rows_of("north")[0]["text"]
    exported = call(capsys, monkeypatch, "export", run, tmp_path / "adapter")
    exported.succeeded()
    assert f"adapter after {ROUNDS} rounds" in exported.out
    generated = call(capsys, monkeypatch, "generate", run, prompt, "--max-new-tokens", 8)
    generated.succeeded()
    base = recipe.parent / "model"
    whole = PeftModel.from_pretrained(uncut(base), tmp_path / "adapter").eval()
    assert generated.out.strip() == _greedy(whole, base, prompt)
    assert generated.out.strip() != _greedy(uncut(base), base, prompt)
    with isthmus.open(run, "south") as silo, torch.no_grad():
        rows = {key: value for key, value in ragged("left", lengths=(24, 24)).items() if key != "labels"}
        assert torch.equal(silo.model(**rows).logits, whole(**rows).logits)
    assert not processes_of(run)
    drafted = call(capsys, monkeypatch, "draft", run, "--prompts", 4, "--max-new-tokens", 8)
    drafted.succeeded()
    assert (run / "silos/north/draft.safetensors").exists()
    again = call(capsys, monkeypatch, "generate", run, prompt, "--max-new-tokens", 8)
    again.succeeded()
    assert again.out == generated.out


def test_privacy_tells_what_was_spent_and_notices_an_edit(
    undisturbed: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed[0], run)
    asked = call(capsys, monkeypatch, "privacy", run, "--json")
    asked.succeeded()
    north, south = json.loads(asked.out)["statements"]
    assert (north["silo"], south["silo"], north["verified"], north["delta"]) == ("north", "south", True, 1e-5)
    assert north["paths"]["gradient"]["releases"] == ROUNDS * STEPS
    assert (north["worst"]["value"], north["worst"]["method"]) == (None, "none")  # nothing is clipped
    shown = call(capsys, monkeypatch, "privacy", run)
    shown.succeeded()
    assert "∞" in shown.out
    ledger = run / "silos" / "south" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"noise": 0.0', '"noise": 9.0', 1))
    edited = call(capsys, monkeypatch, "privacy", run, "--json")
    assert edited.code == 1
    assert [one["verified"] for one in json.loads(edited.out)["statements"]] == [True, False]
    call(capsys, monkeypatch, "run", "--resume", run).failed("is broken at entry", "remedy: restore the ledger")


def test_a_second_run_in_the_same_directory_is_refused(
    undisturbed: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = undisturbed
    monkeypatch.setattr("isthmus.storage.record.LOCK_SECONDS", 0.1)
    with RunDirectory.open(run).locked():
        call(capsys, monkeypatch, "run", "--resume", run).failed("another run is still going on in")


def _greedy(model: torch.nn.Module, folder: Path, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
