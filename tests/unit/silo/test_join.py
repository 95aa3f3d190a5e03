"""Joining: the ends with fresh adapters, a greeting that names the model, and what is missing, by its kind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import IdentityError, ModelError, RecipeError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.ledger import MemoryLedger
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, greeting, join, load_data, load_ends, load_tokenizer
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from tests.conftest import make_recipe, save_tiny_model, write_rows
from tests.oracle.twins import loopback


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def silo(folder: Path, tmp_path: Path) -> Iterator[Silo]:
    recipe = make_recipe(folder)
    service = TrunkService(recipe, RoleDirectory(tmp_path / "trunk"))
    joined = join(recipe, "a", channel=loopback(service, "a", recipe))
    yield joined
    joined.close()
    service.stop()


def test_a_silo_holds_its_ends_and_notes_in_memory(silo: Silo) -> None:
    assert [part.name for part in silo.parts] == ["bottom", "top"]
    assert isinstance(silo.boundary.ledger, MemoryLedger)
    assert silo.guard is None
    with torch.no_grad():
        assert silo.model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 97)
    assert len(silo.boundary.ledger.releases) == 1


def test_its_rows_are_known_to_its_register(silo: Silo, folder: Path, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "w5 w6", "answer": "w7"}]))
    recipe = make_recipe(folder, silo=[{"name": "a", "train": rows}])
    assert [row.prompt for row in load_data(recipe, "a", silo).train] == [[5, 6]]


def test_ends_start_alike_everywhere(folder: Path) -> None:
    recipe = make_recipe(folder)
    one, other = (load_ends(Checkpoint(str(folder)), recipe) for _ in range(2))
    for part, twin in zip(one, other, strict=True):
        tensors = adapters.adapter_of(twin)
        assert tensors
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapters.adapter_of(part).items())


def test_a_greeting_names_model_cut_and_process(folder: Path) -> None:
    recipe, checkpoint = make_recipe(folder), Checkpoint(str(folder))
    first, second = greeting(checkpoint, recipe), greeting(checkpoint, recipe)
    assert (first.fingerprint, first.bottom, first.top) == (checkpoint.fingerprint, 1, 1)
    assert first.instance != second.instance


def test_a_tokenizer_pads_on_the_left(folder: Path) -> None:
    tokenizer: Any = load_tokenizer(folder)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<pad>")


def test_what_is_missing_is_named_by_its_kind(folder: Path, tmp_path: Path) -> None:
    def joined(recipe: Recipe, name: str = "a") -> Silo:
        return join(recipe, name)

    with pytest.raises(RecipeError, match="no silo 'west'"):
        joined(make_recipe(folder), "west")
    with pytest.raises(ModelError):
        joined(make_recipe(tmp_path / "nowhere"))
    with pytest.raises(IdentityError):
        joined(make_recipe(folder, wire={"certificates": str(tmp_path / "none")}))
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(ModelError, match="no usable tokenizer"):
        joined(make_recipe(bare))
