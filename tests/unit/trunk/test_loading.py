"""The trunk's part of a process: the blocks that compute there have their weights, the others take no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import NotSupportedError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part
from isthmus.model.device import CPU
from isthmus.model.rounded_linear import RoundedLinear
from isthmus.model.share import BlockShare
from isthmus.trunk.loading import load_trunk
from tests.conftest import make_recipe, save_tiny_model

BLOCKS = 7


def load(folder: Path, share: BlockShare | None = None, **trunk: Any) -> Part:
    recipe = make_recipe(folder, trunk=trunk)
    return load_trunk(Checkpoint(str(folder)), Cut(1, 1), recipe, CPU, share)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shares_have_the_weights_of_the_whole(family: str, dtype: str, tmp_path: Path) -> None:
    """Experts in one tensor as well; adapters, which rank 0 trains, begin alike everywhere."""
    folder = save_tiny_model(family, tmp_path, blocks=BLOCKS)
    whole = load(folder, dtype=dtype)
    parts = [load(folder, BlockShare(rank, 3), dtype=dtype) for rank in range(3)]
    assert [list(part.here or ()) for part in parts] == [[0], [1, 2], [3, 4]]
    for part in parts:
        own, seen = dict(part.model.named_parameters()), 0
        for name, one in whole.model.named_parameters():
            assert own[name].shape == one.shape
            assert own[name].dtype == one.dtype
            if whole.own_block(name) in (part.here or ()) or "lora" in name:
                assert torch.equal(own[name], one), name
                seen += 1
            else:
                assert own[name].untyped_storage().nbytes() == one.element_size(), name
        assert seen
        assert adapters.adapter_of(part).keys() == adapters.adapter_of(whole).keys()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_share_rounds_its_own_blocks(kind: str, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path, blocks=BLOCKS, hidden_size=64, intermediate_size=64)
    whole, part = load(folder, weights=kind), load(folder, BlockShare(1, 2), weights=kind)
    rounded = {name: one for name, one in part.model.named_modules() if isinstance(one, RoundedLinear)}
    assert {part.own_block(name) for name in rounded} == {2, 3, 4}
    for name, one in rounded.items():
        other = whole.model.get_submodule(name)
        assert isinstance(other, RoundedLinear)
        assert torch.equal(one.weight, other.weight)
    left = [one for name, one in part.model.named_parameters() if part.own_block(name) in (0, 1) and "lora" not in name]
    assert left
    assert all(one.untyped_storage().nbytes() == one.element_size() for one in left), "moved to a device without memory"


def test_more_ranks_than_blocks_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    with pytest.raises(NotSupportedError, match="4 ranks cannot share the 3 blocks of the trunk"):
        load(folder, BlockShare(0, 4))
