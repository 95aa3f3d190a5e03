"""Moves of the cut in a run directory: all files or none, and moments that leave no silo against its recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.engines import repartition
from isthmus.engines.local import create_run
from isthmus.engines.repartition import READY, STAGING, mean_moments, move_if_due
from isthmus.errors import CutError
from isthmus.recipe import Recipe
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.trunk.service import TrunkService
from tests.conftest import make_recipe, save_tiny_model
from tests.integration.processes import train_here, write_federation

TRAIN = {"rounds": 4, "steps": 1, "evaluate": False, "learning_rate": 0.1}
MODEL: dict[str, Any] = {"bottom": 1, "top": 1, "moves": [{"after": 2, "bottom": 2}]}


def trained(folder: Path, **sections: Any) -> RunDirectory:
    """A run that has come to its first move."""
    written = write_federation(
        folder, train=TRAIN, federation={"lora": "plain"} | sections.pop("federation", {}), **sections
    )
    recipe = Recipe.read(written)
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update=MODEL | {"moves": tuple(MODEL["moves"])})}
    )
    run = create_run(Recipe.of(recipe.model_dump(mode="json", exclude_none=True)), folder / "run")
    train_here(run)
    assert run.completed() == 2
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return trained(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def run(finished: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(finished.path, tmp_path / "run")
    return RunDirectory.open(tmp_path / "run")


def states(run: RunDirectory) -> dict[str, Any]:
    """Of trunk, root and silos, by role and round: every tensor, by its place."""
    found: dict[str, Any] = {"cut": (run.recipe().model.bottom, run.recipe().model.top)}
    for name in ("trunk", "root", *run.silos()):
        for files in (run.role(name), run.role(name).shared):
            for number in files.rounds():
                for key, tensor in flat(files.load_round(number), "").items():
                    found[f"{name} {type(files).__name__} {number}{key}"] = tensor
    return found


def flat(value: Any, key: str) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {key: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: one for place, inner in items for name, one in flat(inner, f"{key}/{place}").items()}


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert one["cut"] == other["cut"]
    assert all(torch.equal(value, other[key]) for key, value in one.items() if key != "cut")


def blocks(names: Any) -> set[int]:
    return {int(name.split("layers.")[1].split(".")[0]) for name in names}


def test_adapters_and_moments_change_sides(run: RunDirectory) -> None:
    before = {role: run.role(role).load_round(2) for role in ("trunk", "root", *run.silos())}
    assert move_if_due(run)
    after = {role: run.role(role).load_round(2) for role in before}
    moved = {name for name in before["trunk"]["adapter"] if ".1." in name}
    assert after["trunk"]["adapter"].keys() == before["trunk"]["adapter"].keys() - moved
    assert after["root"]["shared"].keys() == before["root"]["shared"].keys() | moved
    assert all(torch.equal(after["root"]["shared"][name], before["trunk"]["adapter"][name]) for name in moved)
    for silo in run.silos():
        new, old = after[silo]["optimizer"], before[silo]["optimizer"]
        assert len(new["state"]) == len(old["state"]) + len(moved) == len(new["param_groups"][0]["params"])
        shared = run.role(silo).shared.load_round(2)["shared"]
        assert shared.keys() == after["root"]["shared"].keys()
    assert run.recipe().model.bottom == 2
    assert not (run.path / STAGING).exists()
    assert not move_if_due(run)
    train_here(run)
    assert run.completed() == 4
    assert not move_if_due(run)


def test_a_move_that_is_cut_off_is_done_again_or_not_at_all(run: RunDirectory, tmp_path: Path) -> None:
    """At every write of a file, which either happens or does not."""
    shutil.copytree(run.path, tmp_path / "kept")
    before = states(run)
    assert move_if_due(run)
    expected = states(run)
    place, finished = 0, False
    while not finished:
        place += 1
        shutil.rmtree(run.path)
        shutil.copytree(tmp_path / "kept", run.path)
        finished = _cut_off(run, place)
        if not finished and not (run.path / STAGING / READY).exists():
            assert_alike(states(run), before)
        if not finished:
            assert move_if_due(run)
        assert_alike(states(run), expected)
    assert place > 10


class Killed(BaseException):
    pass


def _cut_off(run: RunDirectory, place: int) -> bool:
    """Move until the write with this number; True if there are fewer."""
    left = [place]

    def dying(write: Any) -> Any:
        def written(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise Killed
            return write(*arguments, **options)

        return written

    with pytest.MonkeyPatch.context() as patch:
        for module in (repartition, "isthmus.storage.record"):
            patch.setattr(f"{module if isinstance(module, str) else module.__name__}.writing", dying(_writing()))
        try:
            return move_if_due(run)
        except Killed:
            return False


def _writing() -> Any:
    from isthmus.storage.files import writing

    return writing


def test_moments_stay_where_updates_are_protected(tmp_path: Path) -> None:
    """A silo's block goes to the trunk: its moments only where its updates leave as they are."""
    for name, update in (("open", {"noise": 0.0, "clip": 0.0}), ("noised", {"noise": 0.01, "clip": 1.0})):
        run = trained(tmp_path / name, boundary={"update": update})
        model = run.recipe().model.model_copy(update={"bottom": 1, "moves": ({"after": 2, "top": 1, "bottom": 2},)})
        run.rewrite(run.recipe().model_copy(update={"model": model}))
        assert move_if_due(run)
        back = run.recipe().model.model_copy(update={"moves": ({"after": 2, "bottom": 1},)})
        run.rewrite(run.recipe().model_copy(update={"model": back}))
        assert move_if_due(run)
        optimizer = run.role("trunk").load_round(2)["optimizer"]
        everything = len(optimizer["param_groups"][0]["params"])
        moved = [key for key in run.role("trunk").load_round(2)["adapter"] if ".1." in key]
        assert moved
        assert len(optimizer["state"]) == (everything if name == "open" else everything - len(moved))


def test_means_of_moments() -> None:
    def state(value: float, steps: int) -> dict[str, Any]:
        return {"step": torch.tensor(float(steps)), "exp_avg": torch.full((2,), value)}

    found = mean_moments([{"x": state(1.0, 3), "y": state(5.0, 1)}, {"x": state(2.0, 4)}])
    assert float(found["x"]["step"]) == 4
    assert torch.equal(found["x"]["exp_avg"], torch.full((2,), 1.5))
    assert torch.equal(found["y"]["exp_avg"], torch.full((2,), 5.0))
    assert mean_moments([]) == {}


def test_a_move_that_does_not_fit_is_refused_before_the_first_round(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    moves = {"moves": [{"after": 1, "bottom": 3, "top": 2}]}
    recipe = make_recipe(model, model=moves, federation={"lora": "plain"})
    with pytest.raises(CutError, match=r"the cut \(3, 2\) does not fit a model of 5 blocks"):
        TrunkService(recipe, RoleDirectory(tmp_path / "trunk"))
