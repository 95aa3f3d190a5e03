"""What cannot work is refused at the start: an error with its remedy, exit code 1, no traceback, nothing half begun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from tests.integration.processes import Ended, call, processes_of, write_federation, write_recipe

Call = Callable[..., Ended]


@pytest.fixture
def isthmus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command in this process."""
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("federation"))


def silo(**values: Any) -> dict[str, Any]:
    return {"silo": [{"name": "north", "train": "north.jsonl", **values}], "train": {"evaluate": False}}


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"train": {"round": 3}}, ["unknown key 'train.round'", "did you mean 'rounds'"]),
        ({"train": {"rounds": "three"}}, ["train.rounds = 'three'", "remedy: correct the value of train.rounds"]),
        ({"root": {"minimum": 3}}, ["3 silos needed but 2 listed", "remedy: lower it"]),
        (silo(train="nowhere.jsonl"), ["cannot read the data file", "nowhere.jsonl"]),
        (silo(train="empty.jsonl"), ["holds no row", "remedy: put a row into it"]),
        (silo(train="wordless.jsonl"), ["wordless.jsonl:2 has no text in 'text'", "fill the field or drop the row"]),
        (silo(train="model/model.safetensors"), ["has no name that says its format", "remedy: set silo.format"]),
        (silo(train="model/model.safetensors", format="jsonl"), ["is not UTF-8", "remedy: save the file as UTF-8"]),
    ],
)
def test_recipe_or_data_that_cannot_work(
    sections: dict[str, Any], told: list[str], recipe: Path, isthmus: Call, tmp_path: Path
) -> None:
    (recipe.parent / "empty.jsonl").write_text("\n")
    (recipe.parent / "wordless.jsonl").write_text('{"text": "w5", "label": "w6"}\n{"text": " ", "label": "w6"}\n')
    bad = write_recipe(recipe.parent / "bad.toml", **sections)
    isthmus("run", bad, "--run-dir", tmp_path / "run").failed(*told)
    assert not (tmp_path / "run").exists()


@pytest.mark.process
@pytest.mark.parametrize(
    ("sections", "told"),
    [
        (
            {"path": "./nowhere"},
            ["the trunk failed: the model folder", "remedy: give model.path a folder"],
        ),
        ({"path": "./hollow"}, ["the trunk failed: no usable config.json", "remedy: give model.path a folder"]),
        ({"bottom": 4}, ["the cut (4, 1) does not fit a model of 5 blocks", "remedy: choose model.bottom ≥ 1"]),
    ],
)
def test_model_that_cannot_work(
    sections: dict[str, Any], told: list[str], recipe: Path, isthmus: Call, tmp_path: Path
) -> None:
    """Found by the trunk's process; what it says reaches the user, and nothing is left running."""
    (recipe.parent / "hollow").mkdir(exist_ok=True)
    bad = write_recipe(recipe.parent / "bad.toml", model=sections)
    isthmus("run", bad, "--run-dir", tmp_path / "run").failed(*told)
    assert not processes_of(tmp_path / "run")
    RunDirectory.create(tmp_path / "run", Recipe.read(recipe))  # nothing was begun: a mended recipe takes its place


def test_recipe_that_is_not_there(isthmus: Call, tmp_path: Path) -> None:
    isthmus("run", tmp_path / "none.toml").failed("cannot read the recipe", "remedy: check the path")


def test_recipe_that_is_not_toml(isthmus: Call, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[model\n")
    isthmus("run", tmp_path / "bad.toml").failed("is not TOML", "remedy: correct the line it names")


def test_neither_recipe_nor_run(isthmus: Call) -> None:
    isthmus("run").failed("give either a recipe or --resume")


@pytest.mark.parametrize("command", [("run", "--resume"), ("export",), ("generate",)], ids=lambda command: command[0])
def test_run_directory_that_is_none(command: tuple[str, ...], isthmus: Call, tmp_path: Path) -> None:
    more = {"export": [tmp_path / "out"], "generate": ["hello"]}.get(command[0], [])
    isthmus(*command, tmp_path, *more).failed(
        "is not a run directory", "remedy: name a folder that 'isthmus run' wrote"
    )


def test_run_without_a_finished_round(recipe: Path, isthmus: Call, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", Recipe.read(recipe))
    isthmus("export", run.path, tmp_path / "out").failed("holds no finished round")
    isthmus("generate", run.path, "w5", "--silo", "west").failed("no silo 'west'", "remedy: use one of: north, south")


def test_directory_that_cannot_be_written(recipe: Path, isthmus: Call, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    isthmus("run", recipe, "--run-dir", tmp_path / "file" / "run").failed("cannot write", "remedy: name a place")


def test_wrong_usage_is_told_without_a_traceback(isthmus: Call) -> None:
    told = isthmus("run", "--nothing")
    assert told.code == 2
    assert "No such option" in told.err
    assert "Traceback" not in told.out + told.err
