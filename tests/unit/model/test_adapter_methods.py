"""transformers' and peft's calls for adapters on a split model: as on the uncut one, or refused with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers.integrations.peft import PeftAdapterMixin

from isthmus.errors import IsthmusError, ModelError, NotSupportedError
from isthmus.model import adapters
from isthmus.model.adapter_methods import AdapterMethods
from isthmus.model.split import SplitForCausalLM
from tests.conftest import make_recipe, save_tiny_model, uncut
from tests.oracle.twins import Twins, assert_same, lora_of, make_twins, random_b

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
OTHER = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
Call = Callable[[SplitForCausalLM, Path], Any]
REFUSED: dict[str, Call] = {
    "add_adapter": lambda model, _: model.add_adapter(OTHER, "second"),
    "disable_adapters": lambda model, _: model.disable_adapters(),
    "delete_adapter": lambda model, _: model.delete_adapter("default"),
    "set_adapter": lambda model, _: model.set_adapter("second"),
    "enable_peft_hotswap": lambda model, _: model.enable_peft_hotswap(),
    "merge_and_unload": lambda model, _: model.merge_and_unload(),
    "merge_adapter": lambda model, _: model.merge_adapter(),
    "unmerge_adapter": lambda model, _: model.unmerge_adapter(),
    "unload": lambda model, _: model.unload(),
    "a second name": lambda model, folder: model.load_adapter(folder / "ends", "second"),
    "a whole adapter": lambda model, folder: model.load_adapter(folder / "whole"),
    "no folder": lambda model, _: model.load_adapter(),
    "tensors": lambda model, _: model.load_adapter(adapter_state_dict={}, peft_config=OTHER),
    "a revision": lambda model, folder: model.load_adapter(folder / "ends", revision="main"),
    "another state": lambda model, _: model.get_adapter_state_dict("second"),
    "get_peft_model": lambda model, _: get_peft_model(model, OTHER),
    "get_peft_model, mixed": lambda model, _: get_peft_model(model, OTHER, mixed=True),
    "PeftModel.from_pretrained": lambda model, folder: PeftModel.from_pretrained(model, str(folder / "whole")),
    "PeftModel of its own folder": lambda model, folder: PeftModel.from_pretrained(model, str(folder / "ends")),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("model"))
    twins = make_twins(make_recipe(folder, lora={"rank": 4}), tmp_path_factory.mktemp("trunk"))
    yield twins
    twins.close()


@pytest.fixture(scope="module")
def folder(twins: Twins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two PEFT folders: the ends as the split model saves them, and the uncut model's whole adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    twins.split.save_pretrained(folder / "ends")
    twins.whole.save_pretrained(str(folder / "whole"))
    return folder


def state(twins: Twins) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in twins.split.named_parameters()}


def test_every_method_of_transformers_is_answered_here() -> None:
    theirs = {name for name, value in vars(PeftAdapterMixin).items() if callable(value) and not name.startswith("_")}
    assert theirs <= vars(AdapterMethods).keys()


@pytest.mark.parametrize("call", REFUSED)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute", "ignore:You are trying to modify a model")
def test_what_the_trunk_would_have_to_do_is_refused_and_nothing_changes(call: str, twins: Twins, folder: Path) -> None:
    before = state(twins)
    with pytest.raises(NotSupportedError) as caught:
        REFUSED[call](twins.split, folder)
    assert caught.value.remedy
    after = state(twins)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not hasattr(twins.split, "base_model_prepare_inputs_for_generation")


def test_the_ends_load_what_they_saved(twins: Twins, folder: Path) -> None:
    saved = twins.split.get_adapter_state_dict()
    for part in twins.split.ends:
        adapters.load_adapter(part, {name: 2 * one for name, one in adapters.adapter_of(part).items()})
    trains = {name for part in twins.split.ends for name in adapters.trainable(part)}
    assert twins.split.load_adapter(folder / "ends", is_trainable=True) is None
    assert_same(twins.split.get_adapter_state_dict("default"), saved, 0.0)
    assert {name for part in twins.split.ends for name in adapters.trainable(part)} == trains
    assert twins.split.active_adapters() == ["default"]
    twins.split.set_adapter(["default"])
    twins.split.enable_adapters()


def test_a_loaded_adapter_is_frozen_as_in_transformers(tmp_path: Path) -> None:
    twins = make_twins(make_recipe(save_tiny_model("llama", tmp_path / "model")), tmp_path / "trunk")
    twins.split.save_pretrained(tmp_path / "saved")
    twins.split.load_adapter(str(tmp_path / "saved"))
    assert not any(one.requires_grad for one in twins.split.parameters())
    twins.close()


def test_a_folder_of_the_ends_is_read_by_plain_peft_without_adapters_elsewhere(twins: Twins, folder: Path) -> None:
    read = PeftModel.from_pretrained(uncut(Path(twins.split.config._name_or_path)), str(folder / "ends"))
    assert lora_of(read).keys() == twins.split.get_adapter_state_dict().keys()


@pytest.mark.parametrize(
    ("lora", "error"),
    [({"rank": 2}, "r = 2"), ({"alpha": 3.0}, "lora_alpha = 3"), ({"targets": ["k_proj", "v_proj"]}, "k_proj")],
)
def test_the_ends_of_another_recipe_are_refused(lora: Any, error: str, twins: Twins, tmp_path: Path) -> None:
    recipe = make_recipe(Path(twins.split.config._name_or_path), lora={"rank": 4, **lora})
    other = make_twins(recipe, tmp_path / "trunk")
    other.split.save_pretrained(tmp_path / "saved")
    other.close()
    with pytest.raises(IsthmusError, match=error) as caught:
        twins.split.load_adapter(tmp_path / "saved")
    assert isinstance(caught.value, ModelError | NotSupportedError)
    assert random_b(twins.split_adapter())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT")
def test_a_prompt_that_peft_tunes_crosses_as_embeddings(tmp_path: Path) -> None:
    """Virtual tokens change no layer, so they are the uncut model's; prefixes are caches, and refused."""
    folder = save_tiny_model("llama", tmp_path / "model")
    twins = make_twins(make_recipe(folder), tmp_path / "trunk", moved=False)
    tuned = []
    for model in (twins.split, uncut(folder)):
        torch.manual_seed(0)
        config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        tuned.append(get_peft_model(model, config).eval())
    ids = torch.arange(4, 24).view(2, 10)
    assert torch.equal(*(model(input_ids=ids).logits for model in tuned))
    twins.close()
