"""``isthmus init`` writes a recipe that can be read, or nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

import isthmus
from isthmus.cli.main import app
from isthmus.errors import IsthmusError
from isthmus.recipe import Recipe

RECIPES = Path(__file__).parents[3] / "recipes"
NORTH, SOUTH = ("--silo", "north=north.csv"), ("--silo", "south=south.csv")
MODEL = ("--model", "org/name")


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("north", "south", "east", "west"):
        with Path(f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *([f"{name} {n}", f"c{n % 2}"] for n in range(8))])


def call(*arguments: str, typed: str = "") -> str:
    """What the command prints; its error is raised."""
    found = CliRunner().invoke(app, ["init", *arguments], input=typed, standalone_mode=False)
    if found.exception is not None:
        raise found.exception
    return found.output


def test_flags_make_a_recipe_whose_paths_hold_in_its_folder() -> None:
    said = call("made/first.toml", *MODEL, *NORTH, *SOUTH, "--held-out", "south=east.csv", "--cut", "2,1")
    assert "2 classes in label" in said
    assert said.endswith("next: isthmus data made/first.toml; isthmus run made/first.toml\n")
    recipe = Recipe.read(Path("made/first.toml"))
    assert [Path(file).resolve() for silo in recipe.silo for file in silo.train] == [
        Path("north.csv").resolve(),
        Path("south.csv").resolve(),
    ]
    assert recipe.silo[1].held_out is not None
    assert Path("made/first.toml").stat().st_mode & 0o777 == 0o644


def test_three_silos_sum_under_masks_unless_told_otherwise() -> None:
    more = [part for name in ("east", "west") for part in ("--silo", f"{name}={name}.csv")]
    call("masked.toml", *MODEL, *NORTH, *SOUTH, *more)
    assert Recipe.read(Path("masked.toml"), undecided=True).federation.secure.masks
    call("open.toml", *MODEL, *NORTH, *SOUTH, *more, "--no-masks")
    assert not Recipe.read(Path("open.toml"), undecided=True).federation.secure.masks


def test_templates_and_known_tasks_are_taken_as_given() -> None:
    call("own.toml", *MODEL, *NORTH, *SOUTH, "--prompt", "{text} =", "--answer", " {label}")
    assert Recipe.read(Path("own.toml"), undecided=True).task.prompt == "{text} ="
    call("known.toml", *MODEL, *NORTH, *SOUTH, "--task", "sentiment")
    assert Recipe.read(Path("known.toml"), undecided=True).task.name == "sentiment"


def test_an_example_is_the_shipped_file() -> None:
    call("it.toml", "--example", "hospital-notes")
    assert Path("it.toml").read_text() == (RECIPES / "hospital-notes.toml").read_text()


def test_questions_ask_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cli.init._terminal", lambda: True)
    call("asked.toml", typed="org/name\nnorth\nnorth.csv\neast.csv\nsouth\nsouth.csv\n\n\n")
    recipe = Recipe.read(Path("asked.toml"), undecided=True)
    assert [silo.name for silo in recipe.silo] == ["north", "south"]
    assert recipe.silo[0].held_out is not None
    assert recipe.silo[1].held_out is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a model and the silos"),
        ([*MODEL], "needs a model and the silos"),
        ([*MODEL, "--silo", "north="], "no name with a file"),
        ([*MODEL, *NORTH, *NORTH], "names 'north' twice"),
        ([*MODEL, *NORTH, "--held-out", "south=east.csv"], "--silo does not"),
        ([*MODEL, *NORTH, "--silo", "south=none.csv"], r"none\.csv"),
        ([*MODEL, *NORTH, *SOUTH, "--cut", "2"], "not two numbers"),
        ([*MODEL, *NORTH, *SOUTH, "--cut", "0,1"], "1 or more"),
        ([*MODEL, *NORTH, *SOUTH, "--task", "nothing"], "nothing"),
        ([*MODEL, *NORTH, "--silo", "So uth=south.csv"], "So uth"),
        ([*MODEL, *NORTH, *SOUTH, "--masks"], "masks"),
        (["--example", "nothing"], "no example 'nothing'"),
    ],
)
def test_what_cannot_be_a_recipe_leaves_no_file(arguments: list[str], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        call("new.toml", *arguments)
    assert not [path for path in Path().iterdir() if path.suffix != ".csv"]


def test_a_file_is_replaced_only_when_asked() -> None:
    Path("mine.toml").write_text("mine")
    with pytest.raises(IsthmusError, match=r"mine\.toml is there already"):
        call("mine.toml", "--example", "minimal")
    assert Path("mine.toml").read_text() == "mine"
    call("mine.toml", "--example", "minimal", "--force")
    assert Path("mine.toml").read_text() != "mine"


def test_the_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"isthmus {isthmus.__version__}\n"


def test_silos_that_join_by_invites_need_no_rows_here() -> None:
    asked = ("--prompt", "{text} =", "--answer", " {label}", "--address", "a.example.org:7001")
    said = call("first.toml", *MODEL, "--silo", "north", "--silo", "south", *asked)
    assert "next: isthmus authority init first.toml" in said
    recipe = Recipe.read(Path("first.toml"))
    assert (recipe.model.bottom, recipe.model.top) == (2, 2)
    assert recipe.trunk.address == recipe.root.address == "a.example.org:7001"
    assert [silo.name for silo in recipe.silo] == ["north", "south"]
    assert len(Path("first.toml").read_text().splitlines()) <= 25


def test_without_any_rows_what_is_asked_must_be_said() -> None:
    with pytest.raises(IsthmusError, match="no silo's rows are here") as caught:
        call("first.toml", *MODEL, "--silo", "north")
    assert "--prompt" in caught.value.remedy
    assert not Path("first.toml").exists()


def test_one_silos_rows_tell_what_all_are_asked() -> None:
    call("first.toml", *MODEL, *NORTH, "--silo", "south", "--address", "a.example.org:7001")
    assert Recipe.read(Path("first.toml")).task.choices


@pytest.mark.parametrize("address", ["nowhere", "http://a:1"])
def test_an_address_that_is_none_leaves_no_file(address: str) -> None:
    with pytest.raises(IsthmusError, match="address"):
        call("first.toml", *MODEL, *NORTH, *SOUTH, "--cut", "2,2", "--address", address)
    assert not Path("first.toml").exists()
