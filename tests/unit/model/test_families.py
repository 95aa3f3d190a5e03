"""Families: where each keeps its blocks, embedding, norm and head; others are refused by name."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from isthmus.errors import ModelError
from isthmus.model.families import FAMILIES, REFUSED, family_of, uncut_shapes
from tests.conftest import BLOCKS, VOCABULARY, tiny_config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_where_its_row_says(name: str) -> None:
    config = tiny_config(name)
    family = family_of(config)
    model = uncut_shapes(config)
    prefix = f"{family.uncut_prefix()}{family.blocks}."
    names = [key for key, _ in model.named_parameters()]
    blocks = {key.removeprefix(prefix).split(".")[0] for key in names if key.startswith(prefix)}
    assert blocks == {str(number) for number in range(BLOCKS)}
    backbone = model.get_submodule(family.uncut_prefix()[:-1])
    assert backbone.get_submodule(family.embedding).get_parameter("weight").shape == (VOCABULARY, 32)
    assert model.get_submodule(family.head).get_parameter("weight").shape == (VOCABULARY, 32)
    assert backbone.get_submodule(family.norm)
    assert not family.input_scale or hasattr(backbone, family.input_scale)


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_that_a_split_model_cannot_follow_is_refused_by_name(setting: str) -> None:
    config = tiny_config("llama")
    setattr(config, setting, True)
    with pytest.raises(ModelError, match=setting):
        family_of(config)


def test_another_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ModelError, match="'gpt2' are not supported") as caught:
        family_of(AutoConfig.for_model("gpt2"))
    assert all(name in caught.value.remedy for name in FAMILIES)


def test_linear_attention_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match="'qwen3_next' are not supported: their linear attention keeps a state"):
        family_of(AutoConfig.for_model("qwen3_next"))
