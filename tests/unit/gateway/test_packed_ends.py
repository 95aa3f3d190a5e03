"""Bottom and top for many sequences: modules of their own, weights of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.gateway.packed_ends import NewTokens, PackedEnds
from tests.conftest import Split, make_recipe, save_tiny_model
from tests.oracle.twins import distance


@pytest.mark.parametrize("weights", [None, "int8"])
def test_the_model_stays_as_it_is_and_shares_its_weights(weights: str | None, split: Split, tmp_path: Path) -> None:
    silo = {"name": "a", "train": "a.jsonl"} | ({"weights": weights} if weights else {})
    model, _ = split(make_recipe(save_tiny_model("llama", tmp_path / "model"), silo=[silo]))
    ids_1L = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        before = model(ids_1L).logits
        ends = PackedEnds(model)
        assert torch.equal(model(ids_1L).logits, before)
        own, packed = (
            {**dict(one.named_parameters()), **dict(one.named_buffers())} for one in (model.bottom, ends._bottom.part)
        )
        assert own.keys() == packed.keys()
        assert any(one.dtype == torch.int8 for one in own.values()) == bool(weights)
        assert all(packed[name] is own[name] for name in own)
        caches = ends.new_caches()
        (h_LD,) = ends.through_bottom([NewTokens([4, 5, 6, 7], caches)])
        assert distance(h_LD, model.bottom.hidden(input_ids=ids_1L, use_cache=False)[0]) < 1e-6


def test_caches_are_copied_and_cropped(split: Split, tmp_path: Path) -> None:
    model, _ = split(make_recipe(save_tiny_model("llama", tmp_path / "model")))
    ends = PackedEnds(model)
    caches = ends.new_caches()
    feed = [NewTokens([4, 5, 6], caches)]
    (h_LD,) = ends.through_bottom(feed)
    ends.through_top([h_LD], feed, [1])
    twin = caches.copy()
    twin.crop(2)
    assert (caches.bottom.length, caches.top.length, twin.bottom.length, twin.top.length) == (3, 3, 1, 1)
    again = [NewTokens([5, 6], twin)]
    (more_LD,) = ends.through_bottom(again)
    assert distance(more_LD, h_LD[1:]) < 1e-5
    logits, scored = ends.through_top([more_LD], again, [2])[0], ends.through_top([more_LD], again, [1])[0]
    assert (logits.shape, scored.shape) == ((2, model.config.vocab_size), (1, model.config.vocab_size))
