"""Families: where each keeps its blocks, embedding, norm and head; others are refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from isthmus.errors import ModelError
from isthmus.model.families import FAMILIES, family_of
from tests.conftest import BLOCKS, VOCABULARY, tiny_config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_where_its_row_says(name: str) -> None:
    config = tiny_config(name)
    family = family_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = [key for key, _ in model.named_parameters()]
    blocks = {
        key.removeprefix(family.block_prefix()).split(".")[0] for key in names if key.startswith(family.block_prefix())
    }
    assert blocks == {str(number) for number in range(BLOCKS)}
    assert family.embedding_of(model).get_parameter("weight").shape == (VOCABULARY, 32)
    assert model.get_submodule(family.head).get_parameter("weight").shape == (VOCABULARY, 32)
    assert family.backbone_of(model).get_submodule(family.norm)


def test_another_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ModelError, match="'gpt2' are not supported") as caught:
        family_of(AutoConfig.for_model("gpt2"))
    assert all(name in caught.value.remedy for name in FAMILIES)
