"""``base_model`` of the split model: what libraries that bring their own head and loss compute with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import NotSupportedError
from isthmus.model.backbone import SplitBackbone
from tests.conftest import VOCABULARY, Split, make_recipe, save_tiny_model, uncut

IDS = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def model_of(folder: Path, split: Split, **sections: Any) -> Any:
    return split(make_recipe(folder, **sections))[0]


@torch.no_grad()
def test_it_gives_the_hidden_states_that_the_uncut_models_gives(folder: Path, split: Split) -> None:
    model, whole = model_of(folder, split), uncut(folder)
    assert isinstance(model.base_model, SplitBackbone)
    assert isinstance(model.get_decoder(), SplitBackbone)
    expected = whole.base_model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    actual = model.base_model(IDS, attention_mask=MASK, use_cache=False)
    assert (actual.last_hidden_state - expected.last_hidden_state)[MASK.bool()].abs().max() < 1e-5
    assert actual.past_key_values is None
    logits = model.get_output_embeddings()(actual.last_hidden_state)
    assert (logits - whole(input_ids=IDS, attention_mask=MASK).logits)[MASK.bool()].abs().max() < 1e-6


@torch.no_grad()
def test_its_cache_continues(folder: Path, split: Split) -> None:
    model, whole = model_of(folder, split), uncut(folder)
    first = model.base_model(input_ids=IDS)
    second = model.base_model(input_ids=IDS, past_key_values=first.past_key_values)
    expected = whole.base_model(input_ids=torch.cat([IDS, IDS], dim=1)).last_hidden_state
    assert (second.last_hidden_state - expected[:, 4:]).abs().max() < 1e-5


def test_gradients_pass_through_it(folder: Path, split: Split) -> None:
    model = model_of(folder, split, lora={"targets": ["q_proj"]})
    model.base_model(input_ids=IDS).last_hidden_state.sum().backward()
    moved = [name for name, one in model.named_parameters() if one.grad is not None and one.grad.any()]
    assert any(name.startswith("bottom") for name in moved)
    assert any(name.startswith("top") for name in moved)


def test_its_parameters_are_the_silos_without_the_head_and_named_once(folder: Path, split: Split) -> None:
    model = model_of(folder, split)
    own = {id(one) for one in model.base_model.parameters()}
    assert own < {id(one) for one in model.parameters()}
    assert id(model.get_output_embeddings().weight) not in own
    assert model.base_model.get_input_embeddings().weight.shape == (VOCABULARY, 32)
    assert not any("backbone" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"boundary": {"tail": 1}}, id="tail"),
        pytest.param({"lora": {"targets": ["q_proj", "lm_head"]}}, id="adapter-of-the-head"),
    ],
)
def test_a_loss_that_it_cannot_serve_is_refused(folder: Path, split: Split, sections: dict[str, Any]) -> None:
    model = model_of(folder, split, **sections)
    with pytest.raises(NotSupportedError, match="base_model"):
        model.base_model(input_ids=IDS)
