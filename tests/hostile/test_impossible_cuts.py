"""Cuts that cannot be measured or chosen: each ends in an error that names what was wrong, and the next one works."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import tomli_w

from isthmus.engines.local import create_run
from isthmus.errors import RecipeError
from isthmus.recipe import Recipe
from tests.conftest import write_rows
from tests.integration.processes import call, rows_of, write_federation

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def by_tables(text: str) -> str:
    """A recipe with its list of silos as tables, as people write it."""
    values = tomllib.loads(text)
    silos = values.pop("silo")
    return tomli_w.dumps(values) + "".join(f"[[silo]]\n{tomli_w.dumps(one)}" for one in silos)


@pytest.mark.parametrize(
    ("options", "said", "remedy"),
    [
        (["--cuts", "3,2"], "does not fit a model of 5 blocks", "together at most 4"),
        (["--cuts", "1,1 0,2"], "does not fit a model of 5 blocks", "at least 1 block"),
        (["--cuts", "one,two"], "is not two numbers", "--cuts 2,3"),
        (["--silo", "west"], "no silo 'west'", "north, south"),
        (["--rtt", "inf"], "--rtt is not finite", "leave it out"),
        (["--memory", "inf"], "--memory is not finite", "leave it out"),
        (["--attack", "guessing"], "no attack 'guessing'", "linear"),
    ],
)
def test_what_asks_for_the_impossible_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch, options: list[str], said: str, remedy: str
) -> None:
    path = write_federation(tmp_path)
    before = path.read_bytes()
    ended = call(capsys, monkeypatch, "cut", path, *options, "--write")
    assert ended.code == 1
    assert said in ended.err
    assert remedy in ended.err
    assert "measuring" not in ended.err
    assert path.read_bytes() == before


@pytest.mark.process
def test_too_little_memory_or_rows_are_named_and_then_a_cut_is_found_and_written(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    path = write_federation(tmp_path, model={"cut": "auto"})
    few = call(capsys, monkeypatch, "cut", path, "--cuts", "1,1", "--rows", 7)
    assert few.code == 1
    assert "12 different training rows, too few to attack 7" in few.err
    assert "--rows 6 or less" in few.err
    small = call(capsys, monkeypatch, "cut", path, "--cuts", "1,1", "--rows", 0, "--memory", 1, "--no-trunk", "--write")
    assert small.code == 1
    assert "no cut fits: memory:" in small.err
    assert "at (1, 1), allowed are 1" in small.err
    with pytest.raises(RecipeError):
        Recipe.read(path)
    found = call(capsys, monkeypatch, "cut", path, "--cuts", "1,2", "--rows", 0, "--json", "--write")
    assert found.code == 0
    assert "cannot be reached" in json.loads(found.out)["link"]["source"]
    assert (Recipe.read(path).model.bottom, Recipe.read(path).model.top) == (1, 2)
    text = path.read_text()
    assert call(capsys, monkeypatch, "cut", path, "--own", "--cuts", "1,1").code == 1  # less than the trunk leaves
    path.write_text(by_tables(text))
    own = call(
        *(capsys, monkeypatch, "cut", path, "--silo", "south", "--cuts", "1,1 2,2", "--rows", 0),
        *("--own", "--write", "--no-trunk", "--json"),
    )
    assert own.code == 0
    assert [one["memory"] > 0 for one in json.loads(own.out)["figures"]] == [True]
    assert Recipe.read(path).ends("south") == (2, 2)
    assert Recipe.read(path).ends("north") == (1, 2)


@pytest.mark.process
def test_a_silo_without_rows_is_named(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    path = write_federation(tmp_path)
    write_rows(tmp_path / "north.jsonl", [])
    ended = call(capsys, monkeypatch, "cut", path, "--cuts", "1,1", "--no-trunk")
    assert ended.code == 1
    assert "north.jsonl holds no row" in ended.err


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    path = write_federation(tmp_path)
    (tmp_path / "model" / "config.json").unlink()
    ended = call(capsys, monkeypatch, "cut", path)
    assert ended.code == 1
    assert str(tmp_path / "model") in ended.err
    assert "remedy:" in ended.err
    assert "measuring" not in ended.err


@pytest.mark.parametrize("role", [["trunk"], ["trunk", "--with-root"], ["root"], ["silo", "north"]])
def test_a_role_of_its_own_does_not_guess_the_cut(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch, role: list[str]
) -> None:
    path = write_federation(tmp_path, model={"cut": "auto"})
    command, *others = role
    ended = call(capsys, monkeypatch, command, path, *others, "--run-dir", tmp_path / "run")
    assert ended.code == 1
    assert 'model.cut = "auto"' in ended.err
    assert f"isthmus cut --write {path}" in ended.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="auto"):
        create_run(Recipe.read(path, undecided=True), tmp_path / "run")


@pytest.mark.process
def test_a_run_states_the_cut_that_was_measured(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr("isthmus.engines.cuts.CUTS", ((1, 1),))
    path = write_federation(tmp_path, model={"cut": "auto", "top": 3}, train={"rounds": 1, "steps": 1})
    for name in ("north", "south"):
        write_rows(tmp_path / f"{name}.jsonl", rows_of(name, 4))
    run = call(capsys, monkeypatch, "run", path, "--run-dir", tmp_path / "run")
    assert run.code == 0, run.err
    assert "choice: bottom = 1, top = 1" in run.out
    kept = Recipe.read(tmp_path / "run" / "recipe.toml").model
    assert (kept.cut, kept.bottom, kept.top) == ("stated", 1, 1)
    again = call(capsys, monkeypatch, "run", path, "--run-dir", tmp_path / "run")
    assert again.code == 1
    assert "measuring" not in again.err
