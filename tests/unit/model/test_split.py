"""The split model as transformers sees it: inputs that fit, a trunk that gets real tokens alone, adapters to save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from isthmus.errors import DataError, NotSupportedError
from isthmus.model.crossing import Outbound, Reply
from tests.conftest import VOCABULARY, Split, make_recipe, save_tiny_model, uncut

IDS = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def model_of(folder: Path, split: Split, **sections: Any) -> Any:
    return split(make_recipe(folder, **sections))[0]


def crossed(model: Any) -> list[Outbound]:
    """What the trunk is given from now on."""
    seen: list[Outbound] = []
    trunk = model.trunk.forward

    def kept(outbound: Outbound) -> Reply:
        seen.append(outbound)
        return trunk(outbound)  # type: ignore[no-any-return]

    model.trunk.forward = kept
    return seen


@torch.no_grad()
def test_it_answers_as_the_uncut_model_and_padding_does_not_cross(folder: Path, split: Split) -> None:
    model = model_of(folder, split)
    seen = crossed(model)
    logits = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    expected = uncut(folder)(input_ids=IDS, attention_mask=MASK).logits
    assert (logits - expected)[MASK.bool()].abs().max() < 1e-6
    (outbound,) = seen
    assert outbound.lengths == [3, 4]
    assert outbound.h_TW is not None
    assert outbound.h_TW.shape == (7, 32)


@torch.no_grad()
def test_with_a_tail_only_the_last_positions_cross(folder: Path, split: Split) -> None:
    model = model_of(folder, split, boundary={"tail": 1})
    seen = crossed(model)
    model(input_ids=IDS, attention_mask=MASK, use_cache=False, logits_to_keep=1)
    assert seen[0].lengths == [1, 1]


def test_its_embedding_and_ends_are_the_silos(folder: Path, split: Split) -> None:
    model = model_of(folder, split)
    assert model.get_input_embeddings().weight.shape == (VOCABULARY, 32)
    assert model.ends == (model.bottom, model.top)


def test_what_is_saved_is_the_ends_adapters_and_the_trunks_round(folder: Path, split: Split, tmp_path: Path) -> None:
    model = model_of(folder, split)
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert (set(missing), unexpected) == (set(model._keys_to_ignore_on_save), [])
    assert all("lora_" in name or name.startswith("trunk.") for name in saved)
    assert b'"round": 0' in bytes(saved["trunk.stand_in._extra_state"].tolist())


def test_a_configuration_that_asks_for_tuples_gets_them(split: Split, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model", return_dict=False)
    model = model_of(folder, split)
    found = model(input_ids=IDS, labels=IDS, use_cache=False)  # with which the uncut llama fails
    assert isinstance(found, tuple)
    assert [one.shape for one in found] == [(), (2, 4, VOCABULARY)]


def test_the_hub_is_refused(folder: Path, split: Split, tmp_path: Path) -> None:
    with pytest.raises(NotSupportedError, match="push_to_hub"):
        model_of(folder, split).save_pretrained(tmp_path, push_to_hub=True)


def test_an_example_released_once_is_known_by_its_ids(folder: Path, split: Split) -> None:
    recipe = make_recipe(folder, boundary={"release_once": True}, lora={"freeze_bottom": True})
    model, _ = split(recipe, released=object())
    with pytest.raises(NotSupportedError, match="release_once"):
        model(inputs_embeds=torch.zeros(1, 3, 32), use_cache=False)


def test_with_a_tail_logits_of_other_positions_are_refused(folder: Path, split: Split) -> None:
    model = model_of(folder, split, boundary={"tail": 2})
    with pytest.raises(NotSupportedError, match=r"boundary\.tail"):
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    with pytest.raises(NotSupportedError, match=r"boundary\.tail"):
        model(input_ids=IDS, labels=IDS[:, :1], use_cache=False, logits_to_keep=torch.tensor([1]))
    assert model(input_ids=IDS, labels=IDS, use_cache=False).loss.isfinite()


def test_the_guard_trains_with_ids_and_labels(folder: Path, split: Split) -> None:
    defence = {"defence": {"answer": 1.0}, "residual": True, "forward": {"clip": 2.0, "noise": 1e-6}}
    model = model_of(folder, split, boundary=defence)
    with pytest.raises(NotSupportedError, match=r"boundary\.defence"):
        model(input_ids=IDS, use_cache=False)


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(1, 4)], ids=["short", "few"])
def test_a_mask_that_does_not_fit_is_refused(folder: Path, split: Split, mask: torch.Tensor) -> None:
    with pytest.raises(DataError, match="attention mask"):
        model_of(folder, split)(input_ids=IDS, attention_mask=mask)


def test_a_row_of_padding_only_is_refused(folder: Path, split: Split) -> None:
    with pytest.raises(DataError, match="padding"):
        model_of(folder, split)(input_ids=IDS, attention_mask=torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
