"""What silos have spent, as a table and as JSON; a ledger that does not hold together shows no figure."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from isthmus.engines.local import create_run
from isthmus.errors import RunError
from isthmus.privacy.events import ALL, Charge, Release
from isthmus.privacy.ledger import FileLedger, read_ledger
from isthmus.recipe import Recipe
from isthmus.report.privacy_table import read_statements, show
from isthmus.report.progress import read_progress
from isthmus.storage.record import RunDirectory
from tests.conftest import make_recipe, write_rows
from tests.integration.processes import rows_of, train_here, write_federation


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path, make_recipe(Path("none"), silos=("north", "south")))
    for name in ("north", "south"):
        ledger = FileLedger(made.role(name).path / "ledger.jsonl", silo=name)
        ledger.record(Release("forward", 1, 3, 8, 1.0, 1.0, 96, "gaussian", charges=(Charge("r", gaussian=0.5),)))
        ledger.record(Release("update", 1, 1, 8, 1.0, 1.0, 32, "gaussian", charges=(Charge(ALL, gaussian=0.5),)))
        ledger.close()
    return made


def table(run: RunDirectory) -> str:
    console = Console(file=io.StringIO(), width=80)
    show(read_statements(run), console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_each_silo_has_a_row_a_path_and_its_sums(run: RunDirectory) -> None:
    text = table(run)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    paths = ["forward", "update", "record", "with updates", "silo"]
    firsts = [re.split(r"\s{2,}|:", line.strip())[0] for line in text.split("record: one")[0].splitlines()]
    assert [one for one in firsts if one in (*paths, "north", "south")] == ["north", *paths, "south", *paths]


def test_what_json_is_made_of_has_the_same_figures(run: RunDirectory) -> None:
    north, _ = (statement.to_dict() for statement in read_statements(run))
    assert north["paths"]["forward"]["bytes"] == 96
    assert north["worst"]["value"] < north["with_updates"]["value"] == north["whole"]["value"]


def test_a_ledger_that_was_edited_shows_no_figure(run: RunDirectory) -> None:
    path = run.role("south").path / "ledger.jsonl"
    path.write_text(path.read_text().replace("96", "97", 1))
    assert [told.verified for told in read_statements(run)] == [True, False]
    (south,) = (line for line in table(run).splitlines() if line.strip().startswith("south:"))
    assert "not verified: " in south


def test_the_root_is_among_them_where_it_noises(tmp_path: Path) -> None:
    noise = {"secure": True, "weights": "equal", "noise": {"epsilon": 8.0, "where": "root"}, "clip": {"norm": 1.0}}
    made = RunDirectory.create(tmp_path, make_recipe(Path("none"), silos=("a", "b", "c"), federation=noise))
    assert [told.silo for told in read_statements(made)] == ["a", "b", "c", "root"]


def test_a_partys_own_folder_has_its_own_ledger(run: RunDirectory) -> None:
    """What is missing beside the local engine's files is missing; a silo by itself has no other's."""
    shutil.rmtree(run.role("south").path)
    assert [told.silo for told in read_statements(run)] == ["north"]
    (run.path / "logs").mkdir()
    assert [told.silo for told in read_statements(run)] == ["north", "south"]
    (run.path / "logs").rmdir()
    run.role("north").path.rename(run.path / "trunk")
    with pytest.raises(RunError, match="holds no ledger"):
        read_statements(run)


def test_what_measuring_took_stands_apart(tmp_path: Path) -> None:
    """Every release but an evaluation's is training's; both are charged."""
    boundary = {path: {"clip": 8.0, "noise": 40.0} for path in ("forward", "gradient", "update")}
    write_rows(tmp_path / "other.jsonl", rows_of("other"))
    silos = [{"name": name, "train": f"{name}.jsonl", "held_out": "other.jsonl"} for name in ("north", "south")]
    train = {"rounds": 2, "steps": 2, "evaluate": "end"}
    recipe = Recipe.read(write_federation(tmp_path, train=train, boundary=boundary, silo=silos))
    made = create_run(recipe, tmp_path / "run")
    train_here(made)
    north, _ = read_statements(made)
    assert north.paths["forward"].releases == 4
    assert north.paths["gradient"].releases == 4
    assert north.evaluations.keys() == {"forward"}
    assert north.evaluations["forward"].releases == 2, "before the first round and after the last, a batch each"
    assert north.evaluated_records == 12
    assert 12 < north.records <= 20
    releases = list(read_ledger(made.role("north").path / "ledger.jsonl").releases())
    measured = {charge.record for one in releases if one.evaluation for charge in one.charges}
    trained = {charge.record for one in releases if not one.evaluation for charge in one.charges} - {ALL}
    assert len(measured) == 12
    assert not measured & trained
    worst = max(north.paths["forward"].worst.value, north.evaluations["forward"].worst.value)
    assert north.worst.value >= worst
    progress = read_progress(made, "north", 2)
    assert progress.evaluation_epsilon == pytest.approx(north.evaluations["forward"].worst.value)
    text = table(made)
    assert "forward, held out" in text
    assert "12 of them held out" in text
    written = north.to_dict()
    assert written["evaluations"]["forward"]["releases"] == 2
