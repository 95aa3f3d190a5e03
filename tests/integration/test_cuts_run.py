"""A run of silos with cuts of their own, from the recipe to the exported adapter and every silo's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import isthmus
from isthmus.engines.local import at_address, create_run
from isthmus.engines.roles import start_server
from isthmus.model import adapters
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from isthmus.trunk.service import TrunkService
from tests.conftest import uncut
from tests.integration.processes import Commands, call, rows_of, train_here, until, write_federation
from tests.oracle.twins import distance, prompts, ragged

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's, of transformers
]
GREEDY: dict[str, Any] = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12}
CUTS = {"north": (1, 1), "south": (2, 2)}


def log_of(run: Path, name: str) -> str:
    log = run / "logs" / f"{name}.log"
    return log.read_text() if log.exists() else ""


def test_a_run_moves_its_cut(
    commands: Commands, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = {"rounds": 2, "steps": 2, "learning_rate": 0.1}
    recipe = write_federation(tmp_path / "made", train=train, federation={"lora": "plain"})
    values = Recipe.read(recipe)
    model = values.model.model_copy(update={"bottom": 1, "top": 2, "moves": ({"after": 1, "bottom": 2, "top": 1},)})
    recipe.write_text(values.model_copy(update={"model": model}).toml())
    run = tmp_path / "run"
    command = commands.start("run", recipe, "--run-dir", run)
    until(lambda: "the cut moves" in log_of(run, "north") + log_of(run, "south"), "a move", command=command)
    command.wait().succeeded()
    now = Recipe.read(run / "recipe.toml").model
    assert (now.bottom, now.top) == (2, 1)
    for name in ("north", "south"):
        lines = read_journal(run / "silos" / name / "metrics.jsonl")
        steps = [(line["round"], line["step"]) for line in lines if line["event"] == "step"]
        assert steps == [(number, step) for number in (1, 2) for step in (1, 2)]
        assert "the cut moves after round 1" in log_of(run, name)
        assert "finished after 2 rounds" in log_of(run, name)
    call(capsys, monkeypatch, "export", run, tmp_path / "adapter").succeeded()
    whole = PeftModel.from_pretrained(uncut(Path(values.model.path)), tmp_path / "adapter").eval()
    with isthmus.open(run, "north") as silo, torch.no_grad():
        assert torch.equal(silo.model.generate(**prompts(), **GREEDY), whole.generate(**prompts(), **GREEDY))


def test_silos_with_cuts_of_their_own_train_and_use_one_model(
    commands: Commands, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = write_federation(
        tmp_path / "made", train={"rounds": 2, "steps": 2, "learning_rate": 0.1}, federation={"between": "train"}
    )
    values = Recipe.read(recipe)
    silos = tuple(
        one.model_copy(update=dict(zip(("bottom", "top"), CUTS[one.name], strict=True))) for one in values.silo
    )
    model = values.model.model_copy(update={"bottom": 1, "top": 1})
    recipe.write_text(values.model_copy(update={"silo": silos, "model": model}).toml())
    run = tmp_path / "run"
    commands.run("run", recipe, "--run-dir", run).succeeded()
    call(capsys, monkeypatch, "export", run, tmp_path / "adapter").succeeded()
    whole = PeftModel.from_pretrained(uncut(Path(values.model.path)), tmp_path / "adapter").eval()
    rows = {key: value for key, value in ragged("left", lengths=(24, 24)).items() if key != "labels"}
    for name, ends in CUTS.items():
        with isthmus.open(run, name) as silo, torch.no_grad():
            assert [part.config.num_hidden_layers for part in silo.parts] == list(ends)
            assert distance(silo.model(**rows).logits, whole(**rows).logits) <= 1e-5
            assert torch.equal(silo.model.generate(**prompts(), **GREEDY), whole.generate(**prompts(), **GREEDY))
        text = rows_of(name)[0]["text"]
        call(capsys, monkeypatch, "generate", run, text, "--silo", name, "--max-new-tokens", 4).succeeded()
        measured = call(
            capsys, monkeypatch, "evaluate", run, "--silo", name, "--data", values.party(name).train[0], "--json"
        )
        measured.succeeded()
        assert json.loads(measured.out)


def test_a_run_that_ended_before_the_trunk_heard_of_the_mean_is_used_with_it(tmp_path: Path) -> None:
    """The root has saved its last round, and the trunk what it trained in it."""
    train = {"rounds": 1, "steps": 1, "evaluate": False, "learning_rate": 0.1}
    recipe = Recipe.read(write_federation(tmp_path / "made", train=train, federation={"between": "train"}))
    silos = tuple(
        one.model_copy(update=dict(zip(("bottom", "top"), CUTS[one.name], strict=True))) for one in recipe.silo
    )
    model = recipe.model.model_copy(update={"bottom": 1, "top": 1})
    run = create_run(recipe.model_copy(update={"silo": silos, "model": model}), tmp_path / "run")
    train_here(run)
    saved = run.role("trunk").load_round(1)
    before = run.role("trunk").load_round(0)["adapter"]
    trained = {
        name: before[name] + change for group in saved["between"]["groups"] for name, change in group["change"].items()
    }
    assert any(not torch.equal(one, saved["adapter"][name]) for name, one in trained.items())
    run.role("trunk").save_round(1, saved | {"adapter": saved["adapter"] | trained})
    server, services = start_server(at_address(run.recipe(), "localhost:0"), run, ("trunk",))
    server.stop(0)
    trunk = services["Trunk"]
    assert isinstance(trunk, TrunkService)
    trunk.stop()
    served = adapters.adapter_of(trunk._runner.part)
    shared = run.role("root").load_round(1)["shared"]
    assert all(torch.equal(served[name], shared[name]) for name in trained)
