"""What ranks refuse before they connect, and how they compare what they have. Ranks that run: tests/integration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.engines import torchrun
from isthmus.engines.rank_place import RankPlace
from isthmus.engines.torchrun import device_of, leading
from isthmus.errors import RecipeError
from tests.conftest import make_recipe

PLACE = RankPlace(1, 2, 1)


def recipe_file(folder: Path, **trunk: Any) -> Path:
    path = folder / "recipe.toml"
    path.write_text(make_recipe(folder / "model", trunk=trunk).toml())
    return path


def test_without_torchrun_there_are_no_ranks(tmp_path: Path) -> None:
    with leading(None, tmp_path / "absent") as ranks:
        assert ranks is None


def test_each_rank_has_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert device_of(PLACE, make_recipe(tmp_path)) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "auto"):
        assert device_of(PLACE, make_recipe(tmp_path, trunk={"device": name})) == torch.device("cuda:1")
    with pytest.raises(RecipeError, match="names one device, and each rank has its own"):
        device_of(PLACE, make_recipe(tmp_path, trunk={"device": "cuda:1"}))
    with pytest.raises(RecipeError, match="rank 2 would have CUDA device 2, and there are 2 here"):
        device_of(RankPlace(2, 3, 2), make_recipe(tmp_path, trunk={"device": "cuda"}))


def test_what_differs_is_named() -> None:
    own = {"fingerprint": "a", "device": "cpu", "keys": {"seed": "5", "model.top": "1"}}

    def told(**theirs: Any) -> str:
        found = torchrun._difference("rank 3", {**own, **theirs}, own)
        return "" if found is None else found[0]

    assert told() == ""
    assert told(fingerprint="b") == "rank 3 and rank 0 have different base models (configuration or weights differ)"
    assert told(device="cuda") == "rank 3 computes on cuda, rank 0 on cpu"
    assert told(keys={"seed": "6", "model.top": "1"}) == "rank 3 has seed = 6, rank 0 5"
