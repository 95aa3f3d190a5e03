"""A draft on disk: what cannot be used is refused by name, with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.errors import ModelError
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.drafting import draft_file
from isthmus.silo.drafting.bridge import Bridge
from isthmus.silo.drafting.draft import Draft
from tests.conftest import Split, make_recipe, save_tiny_model


@pytest.fixture
def model(split: Split, tmp_path: Path) -> SplitForCausalLM:
    return split(make_recipe(save_tiny_model("llama", tmp_path / "model")))[0]


@pytest.fixture
def file(model: SplitForCausalLM, tmp_path: Path) -> Path:
    path = tmp_path / draft_file.DRAFT_FILE
    draft_file.save(path, Draft(model, Bridge(model.bottom), torch.tensor([5, 6])), [([1, 2, 3], 1)])
    return path


def refused(path: Path, model: SplitForCausalLM, what: str) -> None:
    with pytest.raises(ModelError, match=what) as caught:
        draft_file.load(path, model)
    assert "isthmus draft" in str(caught.value)


def test_round_trip(file: Path, model: SplitForCausalLM) -> None:
    loaded = draft_file.load(file, model)
    assert loaded.vocabulary.tolist() == [5, 6]
    assert loaded.corpus.find([1, 2]) == (3, 2)


def test_half_a_file(file: Path, model: SplitForCausalLM) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(file, model, "no usable draft")


def test_a_flipped_bit_of_a_weight(file: Path, model: SplitForCausalLM) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(file, model, "checksum does not match")


def test_no_file(file: Path, model: SplitForCausalLM) -> None:
    refused(file.with_name("none"), model, "no usable draft")


@pytest.mark.parametrize("blocks", [None, "many"])
def test_without_its_header(file: Path, model: SplitForCausalLM, blocks: str | None) -> None:
    save_file(load_file(file), file, metadata=None if blocks is None else {"blocks": blocks})
    refused(file, model, "no usable draft")


@pytest.mark.parametrize("name", [draft_file.WORDS, draft_file.SIZES, draft_file.TEXTS, "bridge.scale"])
def test_a_tensor_is_missing(file: Path, model: SplitForCausalLM, name: str) -> None:
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"blocks": "1"})
    refused(file, model, "draft in")


@pytest.mark.parametrize("words", [[], [-1], [10_000]])
def test_words_that_the_model_lacks(file: Path, model: SplitForCausalLM, words: list[int]) -> None:
    tensors = load_file(file) | {draft_file.WORDS: torch.tensor(words, dtype=torch.int64)}
    save_file(tensors, file, metadata={"blocks": "1", "digest": draft_file._digest(1, tensors)})
    refused(file, model, "tokens outside the model's vocabulary")


def test_another_model(file: Path, split: Split, tmp_path: Path) -> None:
    wider = save_tiny_model("llama", tmp_path / "wider", hidden_size=64)
    refused(file, split(make_recipe(wider))[0], "belongs to another model")
