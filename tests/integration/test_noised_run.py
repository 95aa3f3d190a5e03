"""A federation of real processes whose updates' sum is noised, by its silos or by the root."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from tests.conftest import write_rows
from tests.integration.processes import (
    Commands,
    assert_no_traceback,
    call,
    rows_of,
    run_here,
    steps_of,
    train_here,
    until,
    write_federation,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
SILOS = ("east", "north", "south")
ROUNDS, EPSILON = 3, 40.0
CLIP = {"norm": 0.5, "quantile": 0.5, "rate": 0.5}


def recipe(folder: Path, **sections: object) -> Path:
    for name in SILOS:
        write_rows(folder / f"{name}.jsonl", rows_of(name))
    return write_federation(
        folder,
        silo=[{"name": silo, "train": f"{silo}.jsonl"} for silo in SILOS],
        train={"rounds": ROUNDS, "steps": 3, "optimizer": "sgd", "learning_rate": 0.1, "evaluate": False},
        **sections,
    )


def test_silos_noise_their_sum_and_a_run_cut_off_goes_on_with_its_clip(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    federation = {"secure": True, "weights": "equal", "noise": {"epsilon": EPSILON}, "clip": CLIP}
    command = commands.start("run", recipe(tmp_path, federation=federation), "--run-dir", run)
    until(lambda: (2, 1) in steps_of(run, "south"), "a step of the second round", command=command)
    command.role("trunk").kill()
    command.wait().failed("isthmus run --resume")
    clips = [line["clip"] for line in read_journal(run / "root/metrics.jsonl")]
    kept = RunDirectory.open(run).role("root").load_round(len(clips))["clip"]
    train_here(RunDirectory.open(run))
    went_on = [line["clip"] for line in read_journal(run / "root/metrics.jsonl")]
    assert went_on[: len(clips) + 1] == [*clips, *kept.values()]
    assert len(went_on) == ROUNDS
    assert all(abs(math.log(after / before)) <= 0.25 + 1e-9 for before, after in pairwise(went_on))
    told = call(capsys, monkeypatch, "privacy", run, "--json")
    told.succeeded()
    for silo in json.loads(told.out)["statements"]:
        update, norm = silo["paths"]["update"], silo["paths"]["norm"]
        assert update["releases"] == norm["releases"]
        assert ROUNDS <= update["releases"] <= ROUNDS + 1  # the round that was cut off may have been repeated
        assert EPSILON / 2 < update["worst"]["value"] < EPSILON * 1.3
        assert all("in masked sums of 3 silos or more, 3 of them honest" in one for one in update["mechanisms"])
    assert_no_traceback(run)


@pytest.mark.parametrize("masks", [False, True])
def test_a_root_that_noises_tells_what_it_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, masks: bool
) -> None:
    run = tmp_path / "run"
    noise = {"epsilon": EPSILON, "where": "root"}
    federation = {"secure": masks, "weights": "equal", "noise": noise, "clip": {"norm": 0.5}}
    run_here(recipe(tmp_path, federation=federation), run)
    told = call(capsys, monkeypatch, "privacy", run, "--json")
    told.succeeded()
    *silos, root = json.loads(told.out)["statements"]
    assert [silo["whole"]["value"] for silo in silos] == [None] * 3  # the root saw them without noise
    assert (root["silo"], root["paths"]["update"]["releases"]) == ("root", ROUNDS)
    assert root["whole"]["value"] == pytest.approx(EPSILON, rel=1e-3)
    shown = call(capsys, monkeypatch, "privacy", run)
    shown.succeeded()
    assert "summed" in shown.out
