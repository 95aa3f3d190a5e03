"""A first recipe says what it was told, in some twenty lines; shipped examples come as they are."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import RecipeError
from isthmus.recipe import Recipe
from isthmus.recipe.starter import Starter, StartingSilo, example, examples

RECIPES = Path(__file__).parents[3] / "recipes"
TASK = {"prompt": "{text}\nLabel:", "answer": " {label}", "choices": [" a", " b"]}
SILOS = (StartingSilo("north", "north.csv", "test.csv"), StartingSilo("south", "south.csv"))


def read(folder: Path, text: str) -> Recipe:
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    return Recipe.read(folder / "recipe.toml", undecided=True)


def test_two_silos_take_twenty_lines_at_most(tmp_path: Path) -> None:
    full = tuple(StartingSilo(one.name, one.train, "test.csv") for one in SILOS)
    for cut in (None, (1, 2)):
        assert len(Starter("model", full, TASK, cut).text().splitlines()) <= 20


def test_the_file_says_what_it_was_told(tmp_path: Path) -> None:
    recipe = read(tmp_path, Starter("org/name", SILOS, TASK, (2, 3)).text())
    assert (recipe.model.bottom, recipe.model.top) == (2, 3)
    assert recipe.task.choices == (" a", " b")
    assert [silo.held_out for silo in recipe.silo] == [(str(tmp_path / "test.csv"),), None]
    assert not recipe.federation.secure.masks
    assert read(tmp_path, Starter("org/name", SILOS, TASK).text()).model.cut == "auto"


def test_silos_need_no_held_out_rows(tmp_path: Path) -> None:
    silos = tuple(StartingSilo(name, f"{name}.csv") for name in ("a", "b", "c", "d"))
    recipe = read(tmp_path, Starter("org/name", silos, {}, masks=True).text())
    assert recipe.federation.secure.masks


@given(text=st.text(st.characters(exclude_categories=["Cs"])), more=st.lists(st.text(max_size=9), max_size=3))
def test_any_text_is_written_as_it_is(text: str, more: list[str]) -> None:
    if any("\ud800" <= letter <= "\udfff" for one in more for letter in one):
        return
    written = tomllib.loads(Starter(text, (StartingSilo("a", text),), {"prompt": text, "choices": more}).text())
    assert (written["model"]["path"], written["silo"][0]["train"]) == (text, text)
    assert written["task"] == {"prompt": text, "choices": more}


def test_each_shipped_recipe_is_an_example() -> None:
    assert examples() == sorted(path.stem for path in RECIPES.glob("*.toml"))
    for name in examples():
        assert example(name) == (RECIPES / f"{name}.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["none", "", "../recipes/minimal", "minimal.toml"])
def test_an_unknown_example_names_the_others(name: str) -> None:
    with pytest.raises(RecipeError, match="no example") as caught:
        example(name)
    assert "hospital-notes" in caught.value.remedy
