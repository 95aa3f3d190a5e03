"""Moving the cut of a run at a round's end: adapters and the optimizers' moments change sides between silos and trunk.

The new files are made beside the old ones and take their places together: a move that is cut off is done again, or not
at all. All rounds that trunk and root both have are moved, so that the run can go back to an earlier one.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, empty_part
from isthmus.recipe import Recipe
from isthmus.storage.files import disk_errors, writing
from isthmus.storage.record import RoleDirectory, RoundFiles, RunDirectory

Moments = dict[str, dict[str, Any]]
"""An optimizer's state of each tensor, by the tensor's uncut name."""
STAGING, READY = "moving", "ready"
"""The folder of the new files, and the file in it that says that all are there."""
log = logging.getLogger(__name__)


def move_if_due(run: RunDirectory) -> bool:
    """Move the run's cut if its recipe says so after the last finished round; first finish a move that was cut off.

    Returns:
        Whether the cut is another one now.

    Raises:
        RunError: a state of the run cannot be read.
        DiskFullError: the disk is full. The run is as before, or the next call finishes the move.
    """
    place = run.path / STAGING
    if (place / READY).exists():
        _take_places(run)
        return True
    shutil.rmtree(place, ignore_errors=True)
    recipe, completed = run.recipe(), run.completed()
    move = recipe.next_move(completed)
    if move is None or move[0] != completed:
        return False
    bottom, top = move[1]
    log.info("the cut moves to (%d, %d) after round %d", bottom, top, completed)
    with disk_errors(place):
        _stage(run, recipe, recipe.moved_to(move[1]))
        with writing(place / READY) as temporary:
            temporary.write_text(f"{bottom} {top}\n", encoding="ascii")
    _take_places(run)
    return True


@dataclass(frozen=True)
class Sides:
    """Who has which adapter tensors at a cut. The trainable ones are in their optimizers' order."""

    ends: Sequence[str]
    """Trainable tensors of bottom, then of top."""
    trunk: Sequence[str]
    """Trainable tensors of the trunk."""
    whole_trunk: Sequence[str]
    """All tensors of the trunk."""

    @classmethod
    def of(cls, recipe: Recipe) -> Sides:
        """The sides at a recipe's cut."""
        config = Checkpoint(recipe.model.path).config
        ends = adapters.empty_ends(config, recipe)
        trunk = empty_part(config, Cut(recipe.model.bottom, recipe.model.top), "trunk")
        adapters.add_trained_layers(trunk, recipe)
        named = [name for part in ends for name in adapters.trainable(part)]
        return cls(named, list(adapters.trainable(trunk)), list(adapters.adapter_parameters(trunk)))


def _stage(run: RunDirectory, recipe: Recipe, new: Recipe) -> None:
    """Write the moved state of every round that trunk and root both have into the staging folder."""
    old_sides, new_sides = Sides.of(recipe), Sides.of(new)
    staged = RunDirectory(run.path / STAGING)
    trunk, root = run.role("trunk"), run.role("root")
    begun = adapters.initial_tensors(Checkpoint(recipe.model.path).config, recipe)
    moments_leave = recipe.opens_updates
    for number in sorted(trunk.rounds() & (root.rounds() | {0})):
        middle, ends = trunk.load_round(number), root.load_round(number) if number else {"shared": begun}
        silos = {name: _state(run.role(name), number) for name in run.silos()}
        silos = {name: state for name, state in silos.items() if state}
        theirs = _moments(middle["optimizer"], old_sides.trunk)
        own = {name: _moments(state["optimizer"], old_sides.ends) for name, state in silos.items()}
        tensors = {**middle["adapter"], **ends["shared"]}
        shared = {name: tensors[name] for name in new_sides.ends}
        kept = theirs | (mean_moments(list(own.values())) if moments_leave else {})
        staged.role("trunk").save_round(
            number,
            middle
            | {"adapter": {name: tensors[name] for name in new_sides.whole_trunk}}
            | {"optimizer": _optimizer(middle["optimizer"], kept, new_sides.trunk)},
        )
        if number:
            staged.role("root").save_round(number, ends | {"shared": shared})
        for name, state in silos.items():
            moved = _optimizer(state["optimizer"], theirs | own[name], new_sides.ends)
            staged.role(name).save_round(number, state | {"optimizer": moved})
        for name in run.silos():
            files = run.role(name).shared
            if number in files.rounds():
                RoundFiles(staged.role(name).shared.path).save_round(
                    number, files.load_round(number) | {"shared": shared}
                )


def _take_places(run: RunDirectory) -> None:
    """Put the staged files in the places of the old ones; then write the recipe with the new cut."""
    place = run.path / STAGING
    bottom, top = (place / READY).read_text(encoding="ascii").split()
    with disk_errors(run.path):
        for name in ("trunk", "root", *run.silos()):
            for folder in ("rounds", "shared"):
                _replace(RunDirectory(place).role(name).path / folder, run.role(name).path / folder)
        run.rewrite(run.recipe().moved_to((int(bottom), int(top))))
        (place / READY).unlink()
    shutil.rmtree(place)


def _replace(source: Path, target: Path) -> None:
    """Put the files of one folder in the places of another's; rounds that were not moved are of no use any more."""
    if not target.is_dir():
        return
    staged = {file.name for file in source.iterdir()} if source.is_dir() else set()
    for name in sorted(staged):
        with writing(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
    for number in RoundFiles(target).rounds():
        if (name := f"round-{number:04d}.pt") not in staged:
            (target / name).unlink()


def mean_moments(own: Sequence[Moments]) -> Moments:
    """The mean of several optimizers' moments; the number of steps is the largest."""
    found: Moments = {}
    for name in {name for one in own for name in one}:
        states = [one[name] for one in own if name in one]
        found[name] = {key: _mean([state[key] for state in states], steps=key == "step") for key in states[0]}
    return found


def _mean(values: Sequence[Any], *, steps: bool) -> Any:
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    stacked = torch.stack(list(values))
    return stacked.max(dim=0).values if steps else (stacked.double().sum(dim=0) / len(values)).to(values[0].dtype)


def _moments(state: Mapping[str, Any], names: Sequence[str]) -> Moments:
    """An optimizer's saved state by name."""
    return {names[number]: own for number, own in state["state"].items()}


def _optimizer(state: Mapping[str, Any], moments: Moments, names: Sequence[str]) -> dict[str, Any]:
    """An optimizer's saved state for these tensors."""
    (group,) = state["param_groups"]
    own = {number: moments[name] for number, name in enumerate(names) if name in moments}
    return {**state, "state": own, "param_groups": [{**group, "params": list(range(len(names)))}]}


def _state(directory: RoleDirectory, number: int) -> dict[str, Any]:
    return directory.load_round(number) if number in directory.rounds() else {}
