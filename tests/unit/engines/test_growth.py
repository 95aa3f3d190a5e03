"""Silos that are added to a recipe which is being served: which changes are taken up, and when."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

from isthmus.engines import growth
from isthmus.engines.growth import Growth, check_growth
from isthmus.errors import RecipeError
from isthmus.federation.aggregator import GreetedAggregator
from isthmus.joining.authority_folder import AuthorityFolder
from isthmus.recipe import Recipe
from tests.integration.processes import write_recipe

SILOS = [{"name": name, "train": f"{name}.jsonl"} for name in ("north", "south", "east")]
LATE = {"name": "late", "train": "late.jsonl"}


class Held:
    """An aggregator whose round ends when the test says so."""

    def __init__(self) -> None:
        self.future: Future[None] = Future()
        self.asked = 0

    def hold(self) -> Future[None]:
        self.asked += 1
        return self.future


def recipe_of(path: Path, **sections: Any) -> Recipe:
    return Recipe.read(write_recipe(path, **{"train": {"evaluate": False}, "silo": SILOS, **sections}))


def rewrite(path: Path, **sections: Any) -> None:
    before = path.stat().st_mtime_ns
    recipe_of(path, **sections)
    os.utime(path, ns=(before + 10**9, before + 10**9))


@pytest.fixture
def watched(tmp_path: Path) -> tuple[Path, Growth, Held]:
    path = tmp_path / "recipe.toml"
    recipe = recipe_of(path)
    authority = AuthorityFolder.create(tmp_path / "authority", path)
    return path, Growth(recipe, authority, "localhost:7"), Held()


def due(growth: Growth, held: Held) -> bool:
    return growth.due(cast(GreetedAggregator, held))


def test_a_silo_is_taken_up_between_two_rounds(watched: tuple[Path, Growth, Held]) -> None:
    path, growing, held = watched
    assert not due(growing, held)
    assert not held.asked
    rewrite(path, silo=[*SILOS, LATE])
    assert not due(growing, held)  # the round goes on
    assert not due(growing, held)
    assert held.asked == 1
    held.future.set_result(None)
    assert due(growing, held)
    assert growing.recipe.tree.silos == ("north", "south", "east", "late")
    assert growing.recipe.trunk.address == growing.recipe.root.address == "localhost:7"


def test_under_masks_the_others_learn_of_it_first(
    watched: tuple[Path, Growth, Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, held = watched
    masks = {"federation": {"secure": {"masks": True}}, "root": {"minimum": 3}}
    recipe = recipe_of(path, **masks)
    growing = Growth(recipe, AuthorityFolder(path.parent / "authority"), "localhost:7")
    held.future.set_result(None)
    rewrite(path, silo=[*SILOS, LATE], **masks)
    assert not due(growing, held)
    now = time.monotonic()
    monkeypatch.setattr(growth.time, "monotonic", lambda: now + growth.ROSTER_SECONDS + 1)
    assert due(growing, held)


@pytest.mark.parametrize(
    "sections",
    [
        {"silo": [*SILOS, LATE], "seed": 6},
        {"silo": [*SILOS, LATE], "lora": {"rank": 8}},
        {"silo": [LATE, *SILOS]},
        {"silo": SILOS[:2]},
        {"silo": [*SILOS[:2], LATE]},
    ],
)
def test_other_changes_are_not_taken_up(sections: dict[str, Any], watched: tuple[Path, Growth, Held]) -> None:
    path, growing, held = watched
    rewrite(path, **sections)
    for _ in range(3):
        assert not due(growing, held)
    assert not held.asked
    rewrite(path, silo=[*SILOS, LATE])  # mended
    os.utime(path, ns=(10**18, 10**18))
    due(growing, held)
    assert held.asked


def test_a_file_that_is_half_written_is_read_again_when_it_changes(watched: tuple[Path, Growth, Held]) -> None:
    path, growing, held = watched
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    os.utime(path, ns=(10**18, 10**18))
    assert not due(growing, held)
    path.unlink()
    assert not due(growing, held)
    recipe_of(path, silo=[*SILOS, LATE])
    due(growing, held)
    assert held.asked


@pytest.mark.parametrize("table", [{"control": "scaffold"}, {"normalized": True}])
def test_what_depends_on_the_number_of_silos_is_not_changed_while_it_runs(
    table: dict[str, Any], tmp_path: Path
) -> None:
    before, after = recipe_of(tmp_path / "before.toml"), recipe_of(tmp_path / "after.toml", silo=[*SILOS, LATE])
    after = after.model_copy(update={"federation": after.federation.model_copy(update=table)})
    with pytest.raises(RecipeError, match=f"while a federation with federation.{next(iter(table))} runs") as caught:
        check_growth(before, after)
    assert "start them again" in caught.value.remedy


def test_of_a_tree_with_edges_the_parties_start_again(tmp_path: Path) -> None:
    edges = [
        {"name": "e", "address": "e:1", "silos": ["north", "south"]},
        {"name": "f", "address": "f:1", "silos": ["east", "late"]},
    ]
    after = recipe_of(tmp_path / "after.toml", silo=[*SILOS, LATE], edge=edges)
    with pytest.raises(RecipeError, match="with edges"):
        check_growth(recipe_of(tmp_path / "before.toml"), after)
