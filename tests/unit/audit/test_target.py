"""The federation that is attacked: a recipe before its first round, or a run with what it learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.audit.target import Target, open_target
from isthmus.errors import RecipeError, RunError
from isthmus.storage.record import RunDirectory
from tests.conftest import make_recipe


def test_a_recipe_has_learned_nothing(tmp_path: Path) -> None:
    recipe = make_recipe(Path("none"))
    target = Target(recipe, RunDirectory.create(tmp_path / "run", recipe))
    for one in (Target(recipe), target):
        assert (one.completed, dict(one.shared()), dict(one.trunk_adapter())) == (0, {}, {})


def test_a_run_has_what_its_last_round_left(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", make_recipe(Path("none")))
    run.role("root").save_round(1, {"shared": {"x": torch.ones(2)}})
    run.role("trunk").save_round(1, {"adapter": {"y": torch.ones(3)}})
    target = open_target(run.path)
    assert target.completed == 1
    assert target.shared()["x"].tolist() == [1.0, 1.0]
    assert target.trunk_adapter()["y"].tolist() == [1.0] * 3


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        open_target(tmp_path)
    with pytest.raises(RecipeError):
        open_target(tmp_path / "none.toml")


def test_a_partys_own_folder_is_refused(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", make_recipe(Path("none")))
    run.role("a").save_round(1, {})
    with pytest.raises(RunError, match="lacks what the trunk or the root learned"):
        open_target(run.path)
