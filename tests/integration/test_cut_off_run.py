"""Every way in which ``isthmus run`` can be cut off, and that it ends as if it had not been."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest

from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from tests.integration.processes import (
    Commands,
    SmallDisk,
    alive,
    assert_no_traceback,
    assert_same,
    processes_of,
    run_here,
    states,
    steps_of,
    until,
    until_step,
    write_federation,
    write_recipe,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
ROUNDS, STEPS = 5, 40


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("federation"))


def test_run_cut_off_in_every_way_resumes_to_the_same_adapters(
    recipe: Path, commands: Commands, tmp_path: Path
) -> None:
    run_here(recipe, tmp_path / "undisturbed")
    with SmallDisk(megabytes=4) as disk:
        run = disk.folder / "run"

        cut_off = commands.start("run", recipe, "--run-dir", run)
        until_step(run, 1, 5, cut_off)
        cut_off.role("trunk").kill()
        cut_off.wait().failed("the trunk was killed by SIGKILL", "isthmus run --resume")
        _assert_left(run, completed=0)

        cut_off = commands.start("run", "--resume", run)
        until_step(run, 2, 5, cut_off)
        cut_off.role("south").kill()
        cut_off.wait().failed("silo south was killed by SIGKILL", "isthmus run --resume")
        _assert_left(run, completed=1)

        cut_off = commands.start("run", "--resume", run)
        until_step(run, 3, 5, cut_off)
        orphans = cut_off.process.children()
        assert len(orphans) == 3
        cut_off.process.kill()
        cut_off.wait()
        assert RunDirectory.open(run).role("root").last_round() == 2

        cut_off = commands.start("run", "--resume", run)  # at once: it has to wait for the orphans to end
        until_step(run, 4, 5, cut_off)
        assert not any(alive(orphan) for orphan in orphans)
        disk.fill(cut_off.process.children())
        cut_off.wait().failed("the disk is full", "remedy: free some space")
        disk.free()
        _assert_left(run, completed=3)

        cut_off = commands.start("run", "--resume", run)
        until_step(run, 5, 5, cut_off)
        cut_off.process.send_signal(signal.SIGINT)
        stopped = cut_off.wait()
        assert stopped.code == 130
        assert f"stopped; continue with 'isthmus run --resume {run}'" in stopped.err
        assert "Traceback" not in stopped.out + stopped.err
        _assert_left(run, completed=4)

        commands.run("run", "--resume", run).succeeded()
        assert_same(states(run, ROUNDS), states(tmp_path / "undisturbed", ROUNDS))
        assert_no_traceback(run)
        steps = steps_of(run, "south")  # the round under way was repeated, never one that had ended
        assert all(later[0] - earlier[0] in (0, 1) for earlier, later in itertools.pairwise(steps))
        assert steps[-STEPS:] == [(ROUNDS, step) for step in range(1, STEPS + 1)]


def test_a_lost_silo_is_named_and_the_others_go_on(recipe: Path, commands: Commands, tmp_path: Path) -> None:
    patient = write_recipe(
        recipe.parent / "minimum.toml",
        root={"minimum": 1, "patience": 8.0},
        trunk={"patience": 2.0},
        train={"rounds": 6, "evaluate": False},
    )
    run = tmp_path / "run"
    command = commands.start("run", patient, "--run-dir", run)
    until(lambda: steps_of(run, "south") and steps_of(run, "north"), "both silos' first steps", command=command)
    lost_in, _ = steps_of(run, "south")[-1]
    command.role("south").kill()
    ended = command.wait()
    ended.succeeded()
    assert "silo south was killed by SIGKILL; going on with 1 of 2 silos" in ended.out.splitlines()
    rounds = read_journal(run / "root/metrics.jsonl")
    assert [line["round"] for line in rounds] == list(range(1, 7))
    assert [list(line["weights"]) for line in rounds[lost_in:]] == [["north"]] * (6 - lost_in)
    assert steps_of(run, "north")[-1] == (6, STEPS)


def _assert_left(run: Path, *, completed: int) -> None:
    """Nothing runs any more, and the root has what was there before the round that was cut off."""
    assert not processes_of(run)
    assert RunDirectory.open(run).role("root").last_round() == completed
