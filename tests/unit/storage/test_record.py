"""What a run writes: directories taken once, files whole or not there, journals that survive a crash."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isthmus.engines.local import local_recipe
from isthmus.errors import DiskFullError, RunError
from isthmus.recipe import Recipe, TrainSection
from isthmus.report.progress import read_progress
from isthmus.storage import record
from isthmus.storage.journal import Journal
from isthmus.storage.record import ROLES, RoleDirectory, RunDirectory
from tests.conftest import make_recipe
from tests.unit.storage.disk import full

HOLD = "import fcntl,sys,time; f=open(sys.argv[1],'w'); fcntl.flock(f,fcntl.LOCK_EX); print('held',flush=True); input()"


@pytest.fixture
def recipe() -> Recipe:
    return make_recipe(Path("/models/tiny"), silos=("a", "b"))


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", recipe)


@pytest.fixture
def role(tmp_path: Path) -> RoleDirectory:
    return RoleDirectory(tmp_path / "role")


def test_create_then_open(run: RunDirectory, recipe: Recipe, tmp_path: Path) -> None:
    opened = RunDirectory.open(tmp_path / "run")
    assert opened.path == run.path
    assert opened.recipe() == recipe.anchored(run.path)
    assert [path.name for path in run.path.iterdir()] == ["recipe.toml"]


def test_a_recipe_that_no_role_worked_with_is_replaced(run: RunDirectory, tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", make_recipe(Path("/models/tiny"), seed=5))
    assert run.recipe().seed == 5


@pytest.mark.parametrize("taken", ROLES)
def test_a_taken_directory_is_refused_and_left_alone(run: RunDirectory, tmp_path: Path, taken: str) -> None:
    (run.path / taken).mkdir()
    with pytest.raises(RunError, match="already holds a run") as caught:
        RunDirectory.create(tmp_path / "run", make_recipe(Path("/models/tiny"), seed=5))
    assert f"--resume {tmp_path / 'run'}" in caught.value.remedy
    assert run.recipe().seed == 0


def test_a_place_that_is_no_run_or_cannot_be_one(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(RunError, match="not a run directory") as caught:
        RunDirectory.open(tmp_path)
    assert caught.value.remedy
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(RunError, match="cannot write"):
            RunDirectory.create(tmp_path / place, recipe)


def test_a_role_by_itself_writes_its_recipe(tmp_path: Path, recipe: Recipe) -> None:
    """Again and with other addresses or data, but not over a run whose adapters are others."""
    run = RunDirectory(tmp_path / "north")
    assert not run.deployed
    run.record(recipe)
    before = run.recipe_path.stat().st_mtime_ns
    run.record(run.recipe())
    assert run.recipe_path.stat().st_mtime_ns == before
    longer = make_recipe(Path("/models/tiny"), silos=("a", "b"), train={"rounds": 7})
    other = make_recipe(Path("/models/tiny"), silos=("a", "b"), lora={"rank": 2}, seed=5)
    run.record(other)  # no role has worked here
    run.record(recipe)
    (run.path / "silos" / "a").mkdir(parents=True)
    run.record(longer)
    assert run.recipe().train.rounds == 7
    with pytest.raises(RunError, match=r"of another recipe: seed, lora\.rank differs") as refused:
        run.record(other)
    assert "--run-dir" in refused.value.remedy
    assert run.recipe().train.rounds == 7


def test_certificates_inside_the_directory_move_with_it(tmp_path: Path, recipe: Recipe) -> None:
    created = RunDirectory.create(tmp_path / "run", local_recipe(recipe, tmp_path / "run"))
    deployed = RunDirectory(tmp_path / "party")
    deployed.record(local_recipe(recipe, tmp_path / "party"))
    for run in (created, deployed):
        assert run.recipe().wire == local_recipe(recipe, run.path).wire
        moved = RunDirectory.open(run.path.rename(tmp_path / f"moved-{run.path.name}"))
        assert moved.recipe().wire == local_recipe(recipe, moved.path).wire


def test_what_a_party_has_and_what_the_engine(run: RunDirectory) -> None:
    (run.path / "silos" / "b").mkdir(parents=True)
    assert (run.silos(), run.deployed, run.served_here) == (["b"], True, False)
    for name in ("trunk", "root", "silos/a"):
        (run.path / name).mkdir()
    assert (run.silos(), run.deployed, run.served_here) == (["a", "b"], True, True)
    (run.path / "logs").mkdir()
    assert not run.deployed


def test_of_shared_adapters_the_last_two_are_kept(role: RoleDirectory) -> None:
    for number in (1, 2, 5):
        role.shared.save_round(number, {"shared": {}})
    assert role.shared.rounds() == {2, 5}
    assert role.rounds() == set()


def test_who_uses_a_result_locks_out_runs_alone(run: RunDirectory) -> None:
    both = run.locked(shared=True), run.locked(shared=True, seconds=0.0)
    with both[0], both[1], pytest.raises(RunError, match="or its result is in use"), run.locked(seconds=0.0):
        pass
    with run.locked(), pytest.raises(RunError, match="still going on"), run.locked(shared=True, seconds=0.0):
        pass


def test_roles_have_their_folders(run: RunDirectory) -> None:
    folders = [str(run.role(name).path.relative_to(run.path)) for name in ("trunk", "root", "a")]
    assert folders == ["trunk", "root", "silos/a"]


def test_rounds_are_saved_loaded_and_listed(role: RoleDirectory) -> None:
    assert (role.rounds(), role.last_round()) == (set(), 0)
    for number in (0, 3, 12345):
        role.save_round(number, {"w": torch.full((2,), float(number))})
    (role.path / "rounds" / "notes.txt").write_text("")
    (role.path / "rounds" / ".round-0099.pt.part").write_text("")
    assert role.rounds() == {0, 3, 12345}
    assert role.last_round() == 12345
    assert len({role.digest(number) for number in role.rounds()}) == len(role.rounds())
    with pytest.raises(RunError, match="no readable state of round 2"):
        role.digest(2)
    assert torch.equal(role.load_round(3)["w"], torch.full((2,), 3.0))


def test_completed_is_what_trunk_and_root_both_have(run: RunDirectory) -> None:
    assert run.completed() == 0
    for number in (1, 2):
        run.role("trunk").save_round(number, {})
    run.role("root").save_round(1, {})
    assert run.completed() == 1


def test_a_failing_save_leaves_the_old_file(role: RoleDirectory) -> None:
    role.save_round(1, {"w": torch.ones(2)})
    with pytest.raises(Exception, match="pickle"):
        role.save_round(1, {"w": lambda: None})
    assert torch.equal(role.load_round(1)["w"], torch.ones(2))
    assert [path.name for path in (role.path / "rounds").iterdir()] == ["round-0001.pt"]


def test_a_save_on_a_full_disk_leaves_the_old_file(role: RoleDirectory) -> None:
    role.save_round(1, {"w": torch.ones(2)})
    full(role.path / "rounds" / ".round-0001.pt.part")
    with pytest.raises(DiskFullError, match="the disk is full") as caught:
        role.save_round(1, {"w": torch.zeros(200_000)})
    assert "--resume" in caught.value.remedy
    assert torch.equal(role.load_round(1)["w"], torch.ones(2))
    assert [path.name for path in (role.path / "rounds").iterdir()] == ["round-0001.pt"]


@pytest.mark.parametrize("damage", ["absent", "empty", "garbage", "cut", "pickle"])
def test_a_damaged_state_is_named(role: RoleDirectory, damage: str) -> None:
    role.save_round(2, {"w": torch.ones(500)})
    path = role.path / "rounds" / "round-0002.pt"
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "garbage": b"x" * 300,
        "cut": whole[: len(whole) // 2],
        "pickle": b"\x80\x02cos\nsystem\n.",
    }
    path.unlink() if damage == "absent" else path.write_bytes(contents[damage])
    with pytest.raises(RunError, match="no readable state of round 2") as caught:
        role.load_round(2)
    assert caught.value.remedy


def test_a_recipe_on_a_full_disk(tmp_path: Path, recipe: Recipe) -> None:
    full(tmp_path / "run" / ".recipe.toml.part")
    with pytest.raises(DiskFullError):
        RunDirectory.create(tmp_path / "run", recipe)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_held_by_another_process(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "LOCK_SECONDS", 0.2)
    command = [sys.executable, "-c", HOLD, str(run.path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another run is still going on") as caught, run.locked():
            pass
        other.communicate("\n")
    assert caught.value.remedy
    with run.locked() as descriptor:
        assert os.fstat(descriptor).st_ino == (run.path / "lock").stat().st_ino
        with (run.path / "lock").open() as second, pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_lines(run: RunDirectory, lines: list[dict[str, object]]) -> None:
    path = run.role("a").path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    for line in lines:
        Journal(path).append(line)


def step(round: int, number: int, sent: int, loss: float = 1.0) -> dict[str, object]:
    counted = {"tokens": 20, "seconds": 0.5, "sent_bytes": sent, "received_bytes": 2 * sent}
    return {"event": "step", "round": round, "step": number, "loss": loss, **counted}


def test_progress_totals_over_restarts(run: RunDirectory) -> None:
    """Byte counters start again with each process; a step done again after a crash is sent again."""
    evaluation = {"event": "evaluation", "round": 0, "seconds": 1.0, "accuracy": 0.5}
    first = [evaluation, step(1, 1, 100), step(1, 2, 200), step(2, 1, 300)]
    again = [step(2, 1, 90), step(2, 2, 180, loss=0.25), {**evaluation, "round": 2, "accuracy": 0.75}]
    write_lines(run, first + again + [step(3, 1, 60, loss=0.125)])
    progress = read_progress(run, "a", steps_a_round=2)
    assert (progress.steps, progress.loss, progress.tokens_per_second) == (5, 0.125, 40.0)
    assert (progress.sent_bytes, progress.received_bytes) == (300 + 180 + 60, 2 * (300 + 180 + 60))
    assert progress.scores == {0: {"accuracy": 0.5}, 2: {"accuracy": 0.75}}


def test_progress_of_a_silo_that_has_written_nothing(run: RunDirectory) -> None:
    progress = read_progress(run, "a", steps_a_round=2)
    assert (progress.steps, progress.loss, progress.sent_bytes, progress.scores) == (0, None, 0, {})


def test_later_rounds_are_removed_with_the_first_that_a_process_saves_and_no_others(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        RoleDirectory(tmp_path).save_round(number, {})
    directory = RoleDirectory(tmp_path)
    directory.save_round(2, {})
    assert directory.rounds() == {1, 2}
    for number in (5, 4, 3):  # as the trunk's, where rounds do not wait for a slow silo
        directory.save_round(number, {})
    assert directory.rounds() == {1, 2, 3, 4, 5}


def test_rounds_among_which_the_best_is_chosen_stay(tmp_path: Path) -> None:
    directory = RoleDirectory(tmp_path)
    directory.keep_as(TrainSection(rounds=40, evaluate="best", keep_rounds=3))
    for number in range(31):
        directory.save_round(number, {})
        directory.shared.save_round(number, {})
    assert directory.rounds() == {*range(0, 31, 4), 29, 30, 28}
    assert directory.shared.rounds() == {*range(0, 31, 4), 29, 30}
    plain = RoleDirectory(tmp_path / "plain")
    plain.keep_as(TrainSection(rounds=40, keep_rounds=3))
    unmeasured = RoleDirectory(tmp_path / "unmeasured")
    unmeasured.keep_as(TrainSection(rounds=40, keep_rounds=3, evaluate="end"))
    for number in range(31):
        plain.save_round(number, {})
        unmeasured.save_round(number, {})
    assert unmeasured.rounds() == {0, 28, 29, 30}
    assert plain.rounds() == {0, 10, 20, 28, 29, 30}
