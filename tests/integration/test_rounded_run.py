"""A run in which trunk and silos keep weights of few bits, each silo its own, from the recipe to answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

import isthmus
from isthmus.model.rounded_linear import Int4Linear, Int8Linear, RoundedEmbedding
from isthmus.recipe import Recipe
from tests.conftest import uncut
from tests.integration.processes import Commands, call, rows_of, write_federation
from tests.oracle.twins import distance, ragged

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's, of transformers
]
WEIGHTS = {"north": "int8", "south": "int4"}
ROUNDING = {"north": 0.05, "south": 0.2}
"""Relative: the exported adapter is on the base model's own weights."""


def layers_of(part: nn.Module) -> set[type[nn.Module]]:
    plain = {type(one) for name, one in part.named_modules() if "lora_" not in name}
    return plain & {nn.Linear, nn.Embedding, Int8Linear, Int4Linear, RoundedEmbedding}


def test_silos_with_few_bits_train_and_use_one_model(
    commands: Commands, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = {"rounds": 2, "steps": 2, "learning_rate": 0.1}
    recipe = write_federation(tmp_path / "made", train=train, trunk={"weights": "int8"})
    values = Recipe.read(recipe)
    silos = tuple(one.model_copy(update={"weights": WEIGHTS[one.name]}) for one in values.silo)
    recipe.write_text(values.model_copy(update={"silo": silos}).toml())
    run = tmp_path / "run"
    commands.run("run", recipe, "--run-dir", run).succeeded()

    call(capsys, monkeypatch, "export", run, tmp_path / "adapter").succeeded()
    whole = PeftModel.from_pretrained(uncut(Path(values.model.path)), tmp_path / "adapter").eval()
    rows = {key: value for key, value in ragged("left").items() if key != "labels"}
    real = rows["attention_mask"].bool()
    kinds = {"north": {Int8Linear}, "south": {Int4Linear, Int8Linear}}
    for name, own in kinds.items():
        with isthmus.open(run, name) as silo, torch.no_grad():
            bottom, top = silo.parts
            assert layers_of(bottom) == own | {RoundedEmbedding, Int8Linear}
            assert layers_of(top) == own
            found, expected = (model(**rows).logits[real] for model in (silo.model, whole))
            assert 0 < distance(found, expected) < ROUNDING[name]
            prompt = silo.prompt(rows_of(name)[0]["text"])
            plain = silo.model.generate(**prompt, do_sample=False, max_new_tokens=12)
            drafted = silo.model.generate(**prompt, do_sample=False, max_new_tokens=12, prompt_lookup_num_tokens=4)
            assert torch.equal(plain, drafted)
        measured = call(
            capsys, monkeypatch, "evaluate", run, "--silo", name, "--data", values.party(name).train[0], "--json"
        )
        measured.succeeded()
        (scores,) = json.loads(measured.out)["silos"]
        assert scores["rows"] == len(rows_of(name))
