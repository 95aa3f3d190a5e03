"""A run of silos with cuts of their own, from the recipe to the exported adapter and every silo's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import isthmus
from isthmus.recipe import Recipe
from tests.conftest import uncut
from tests.integration.processes import Commands, call, rows_of, write_federation
from tests.oracle.twins import distance, prompts, ragged

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's, of transformers
]
GREEDY: dict[str, Any] = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12}
CUTS = {"north": (1, 1), "south": (2, 2)}


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
