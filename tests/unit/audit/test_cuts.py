"""Measuring cuts in fresh processes, the cut of a run that leaves it open, and the recipe that gets it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.audit.cuts import CutPlan, cut_for_run, measure_cuts, write_cut
from isthmus.errors import CutError, RecipeError
from isthmus.recipe import Recipe
from isthmus.recipe.recipe import with_checksum
from tests.integration.processes import write_federation

LEAST = '[model]\npath = "model"\n{}\n[[silo]]\nname = "north"\ntrain = "north.jsonl"\nheld_out = "north.jsonl"\n'


@pytest.mark.process
def test_cuts_are_measured_and_one_is_chosen(tmp_path: Path) -> None:
    recipe = Recipe.read(write_federation(tmp_path))
    said: list[str] = []
    plan = CutPlan("south", ("1,1 1,2",), rows=4, leakage=1.0, bandwidth=1e6)
    choice = measure_cuts(recipe, plan, said.append)
    assert [(one.bottom, one.top) for one in choice.figures] == [(1, 1), (1, 2)]
    assert (choice.silo, choice.limits.leakage) == ("south", 1.0)
    assert all(one.memory and one.silo_step and one.trunk_step and one.attacked_rows == 4 for one in choice.figures)
    assert len(said) == 2
    assert choice.link.rtt is None  # nobody serves the recipe's trunk
    assert recipe.model.cut == "stated"
    assert choice.averaging is not None
    passes = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    assert measure_cuts(passes, replace(plan, cuts=("1,1",), rows=0, leakage=None), said.append).averaging is None


@pytest.mark.process
def test_a_run_leaves_room_for_all_its_parties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.engines.cuts.CUTS", ((1, 1),))
    recipe = Recipe.read(write_federation(tmp_path, model={"cut": "auto"}), undecided=True)
    monkeypatch.setattr("isthmus.audit.cuts.free_memory", lambda: 3_000_000)
    with pytest.raises(CutError, match="allowed are 1"):
        cut_for_run(recipe, lambda message: None)


def test_a_cut_is_written_and_all_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    text = (
        '# ours\r\nseed = 3\r\n\r\n[model] # the base\r\npath = "model"\r\ncut = "auto"  # measured\r\n'
        'top = 7\r\nleakage = 0.5\r\n\r\n[train]\r\nevaluate = false\r\n[[silo]]\r\nname = "north"\r\ntrain = "a"'
    )
    path.write_bytes(text.encode())
    path.chmod(0o640)
    write_cut(path, 5, 1)
    recipe = Recipe.read(path)
    assert (recipe.model.cut, recipe.model.bottom, recipe.model.top) == ("stated", 5, 1)
    assert (recipe.model.leakage, recipe.seed, recipe.silo[0].name) == (0.5, 3, "north")
    kept = set(path.read_bytes().decode().splitlines())
    assert {"# ours", "[model] # the base", "leakage = 0.5", "[train]"} <= kept
    assert path.stat().st_mode & 0o777 == 0o640
    write_cut(path, 1, 1)
    assert (Recipe.read(path).model.bottom, Recipe.read(path).model.top) == (1, 1)
    assert [one.name for one in tmp_path.iterdir()] == ["recipe.toml"]


def test_a_silos_own_cut_is_written_to_its_table(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    silos = [f'[[silo]]\nname = "{name}"\ntrain = "{name}"\nheld_out = "{name}"\n' for name in ("north", "south")]
    columns = '[silo.columns]\nprompt = "bottom"\n[[silo]]\nname = "west"\ntrain = "w"\nheld_out = "w"\n'
    path.write_text('[model]\npath = "model"\nbottom = 2\n' + "bottom = 3\n".join([*silos, "# end\n"]) + columns)
    write_cut(path, 5, 2, "south")
    recipe = Recipe.read(path)
    assert [(one.bottom, one.top) for one in recipe.silo] == [(3, None), (5, 2), (None, None)]
    assert (recipe.model.bottom, recipe.model.top) == (2, 2)
    before = path.read_text()
    with pytest.raises(RecipeError, match="would keep 1 of the 2 blocks"):
        write_cut(path, 1, 2, "west")
    with pytest.raises(RecipeError, match="would keep 3 of the 4 blocks"):
        write_cut(path, 4, 1)
    assert path.read_text() == before


def test_a_cut_of_a_silos_own_is_no_smaller_than_the_trunk_leaves(tmp_path: Path) -> None:
    path = write_federation(tmp_path, model={"bottom": 2, "top": 2})
    with pytest.raises(CutError, match="2 blocks at the bottom and 2 at the top"):
        measure_cuts(Recipe.read(path), CutPlan(cuts=("1,2 2,1",), own=True), print)
    undecided = Recipe.read(write_federation(tmp_path, model={"cut": "auto"}), undecided=True)
    with pytest.raises(RecipeError, match="auto"):
        measure_cuts(undecided, CutPlan(own=True), print)


@pytest.mark.parametrize(
    "text",
    [
        LEAST.format('cut = "auto"').replace("[model]\npath", "model.path").replace("\ncut", "\nmodel.cut"),
        '[[silo]]\nname = "north"\ntrain = "a"\nheld_out = "a"\n[ "model" ]\npath = "model"\ncut = "auto"\n',
        'model = { path = "model", cut = "auto" }\n[[silo]]\nname = "north"\ntrain = "a"\nheld_out = "a"\n',
        '[task]\nsystem = """\n[model]\ntop = 3\n"""\nchat = true\nprompt = "{text}"\n' + LEAST.format('cut = "auto"'),
    ],
)
def test_a_recipe_written_another_way_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="cannot be written") as refused:
        write_cut(path, 5, 1)
    assert "bottom = 5 and top = 1" in refused.value.remedy
    assert path.read_text() == text
    assert [one.name for one in tmp_path.iterdir()] == ["recipe.toml"]


def test_a_runs_own_recipe_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text := with_checksum(LEAST.format("bottom = 1")))
    with pytest.raises(RecipeError, match="cannot be written"):
        write_cut(path, 5, 1)
    assert path.read_text() == text
