"""Moving the cut at a round's end: adapters and the optimizers' moments change sides between silos and trunk.

``Move`` is the arithmetic: what a party's state is afterwards. ``move_if_due`` moves a run of ``isthmus run``, all of
whose parties have their files in one directory; ``moving`` moves parties on machines of their own.

The new files are made beside the old ones and take their places together: a move that is cut off is done again, or not
at all.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, empty_part
from isthmus.recipe import Recipe
from isthmus.storage.files import disk_errors, writing
from isthmus.storage.record import RoundFiles, RunDirectory

Moments = dict[str, dict[str, Any]]
"""An optimizer's state of each tensor, by the tensor's uncut name."""
Tensors = Mapping[str, torch.Tensor]
State = dict[str, Any]
"""What a party saved at the end of a round."""
STAGING, READY = "moving", "ready"
"""The folder of the new files, and the file in it that says that all are there."""
LEFT, CUT = "left", "cut"
"""In the folder of a party by itself: what left a trunk at each move, for who asks later; bottom and top that the
party's files are of."""
log = logging.getLogger(__name__)


def move_if_due(run: RunDirectory) -> bool:
    """Move the run's cut if its recipe says so after the last finished round; first finish a move that was cut off. All
    rounds that trunk and root both have are moved, so that the run can go back to an earlier one.

    Returns:
        Whether the cut is another one now.

    Raises:
        RunError: a state of the run cannot be read.
        DiskFullError: the disk is full. The run is as before, or the next call finishes the move.
    """
    if finish_move(run):
        return True
    recipe, completed = run.recipe(), run.completed()
    due = recipe.next_move(completed)
    if due is None or due[0] != completed:
        return False
    move = Move(recipe, *due)
    with staging(run, move) as staged:
        own = {number: _silo_states(run, number) for number in run.role("trunk").rounds()}
        kept: dict[int, list[Moments]] = {}
        if recipe.opens_updates:
            kept = {number: [move.moments(one) for one in states.values()] for number, states in own.items()}
        theirs = stage_servers(staged, run, move, kept)
        for number, (shared, moments) in theirs.items():
            for name, state in own[number].items():
                staged.role(name).save_round(number, move.of_silo(state, moments))
            for name in run.silos():
                files = run.role(name).shared
                if number in files.rounds():
                    RoundFiles(staged.role(name).shared.path).save_round(
                        number, files.load_round(number) | {"shared": shared}
                    )
    return True


@dataclass(frozen=True)
class Sides:
    """Who has which adapter tensors at a cut, with their shapes. The trainable ones are in their optimizers' order."""

    ends: Mapping[str, tuple[int, ...]]
    """Trainable tensors of bottom, then of top."""
    trunk: Mapping[str, tuple[int, ...]]
    """Trainable tensors of the trunk."""
    whole_trunk: Mapping[str, tuple[int, ...]]
    """All tensors of the trunk."""

    @classmethod
    def of(cls, recipe: Recipe) -> Sides:
        """The sides at a recipe's cut."""
        config = Checkpoint(recipe.model.path).config
        trunk = empty_part(config, Cut(recipe.model.bottom, recipe.model.top), "trunk")
        adapters.add_trained_layers(trunk, recipe)
        whole = {name: tuple(one.shape) for name, one in adapters.adapter_parameters(trunk).items()}
        return cls(adapters.shared_shapes(adapters.empty_ends(config, recipe)), adapters.shared_shapes([trunk]), whole)


@dataclass(frozen=True)
class Move:
    """A move of the cut: who has which tensors before and after it, and what each party's state becomes.

    Args:
        recipe: with the cut before.
        after: the round after which the cut moves.
        ends: blocks of bottom and top from then on.
    """

    recipe: Recipe
    after: int
    ends: tuple[int, int]

    @cached_property
    def moved(self) -> Recipe:
        """The recipe with the cut afterwards."""
        return self.recipe.moved_to(self.ends)

    @cached_property
    def old(self) -> Sides:
        """The sides before."""
        return Sides.of(self.recipe)

    @cached_property
    def new(self) -> Sides:
        """The sides afterwards."""
        return Sides.of(self.moved)

    @property
    def leaving(self) -> dict[str, tuple[int, ...]]:
        """The tensors that go from the trunk to the silos, with their shapes."""
        return {name: shape for name, shape in self.new.ends.items() if name in self.old.whole_trunk}

    @property
    def entering(self) -> dict[str, tuple[int, ...]]:
        """The tensors that go from the silos to the trunk, with their shapes."""
        return {name: shape for name, shape in self.old.ends.items() if name in self.new.whole_trunk}

    def moments(self, silo: State) -> Moments:
        """A silo's moments, by name."""
        return _moments(silo["optimizer"], list(self.old.ends))

    def trunk_moments(self, trunk: State) -> Moments:
        """The trunk's moments, by name."""
        return _moments(trunk["optimizer"], list(self.old.trunk))

    def of_trunk(self, state: State, tensors: Tensors, moments: Moments) -> State:
        """The trunk's state afterwards.

        Args:
            tensors: the adapters of blocks that come to it.
            moments: theirs, as far as they are known; others begin anew.
        """
        whole = {**state["adapter"], **tensors}
        optimizer = _optimizer(state["optimizer"], moments | self.trunk_moments(state), list(self.new.trunk))
        return state | {"adapter": {name: whole[name] for name in self.new.whole_trunk}, "optimizer": optimizer}

    def of_root(self, state: State, tensors: Tensors) -> State:
        """The root's state afterwards.

        Args:
            tensors: the adapters of blocks that come to the silos.
        """
        shared = {**state["shared"], **tensors}
        return state | {"shared": {name: shared[name] for name in self.new.ends}}

    def of_silo(self, state: State, moments: Moments) -> State:
        """A silo's state afterwards.

        Args:
            moments: the trunk's. Those of factors that no silo trains are dropped.
        """
        lora = self.recipe.federation.lora
        trained = adapters.select_factors(self.new.ends, "B" if lora == "frozen-a" else "AB")
        theirs = {name: one for name, one in moments.items() if name in trained}
        return state | {"optimizer": _optimizer(state["optimizer"], theirs | self.moments(state), list(self.new.ends))}


@contextmanager
def staging(
    run: RunDirectory, move: Move, roles: Collection[str] | None = None, place: str = STAGING
) -> Iterator[RunDirectory]:
    """A directory for new files, which take the places of the old ones at the end of the ``with`` block, and with them
    the recipe that of the new cut.

    Args:
        roles: the roles that move; None: all. Rounds of theirs without a new file are removed, as nobody can use them.
        place: the directory's name. Two processes that move in one run directory have two of them.
    """
    staged = RunDirectory(run.path / place)
    shutil.rmtree(staged.path, ignore_errors=True)
    log.info("the cut moves to (%d, %d) after round %d", *move.ends, move.after)
    with disk_errors(staged.path):
        yield staged
        with writing(staged.path / READY) as temporary:
            temporary.write_text(f"{move.ends[0]} {move.ends[1]}\n", encoding="ascii")
    finish_move(run, roles, place)


def finish_move(run: RunDirectory, roles: Collection[str] | None = None, place: str = STAGING) -> bool:
    """Finish a move whose new files are all there; remove what is left of one that was cut off before that.

    Args:
        roles, place: as in ``staging``.

    Returns:
        Whether there was one to finish.
    """
    staged = RunDirectory(run.path / place)
    if not (staged.path / READY).exists():
        shutil.rmtree(staged.path, ignore_errors=True)
        return False
    bottom, top = (staged.path / READY).read_text(encoding="ascii").split()
    with disk_errors(run.path):
        for name in ("trunk", "root", *run.silos()) if roles is None else roles:
            old, new = run.role(name).path, staged.role(name).path
            for folder in ("rounds", "shared"):
                _replace(new / folder, old / folder)
            for file in sorted((new / LEFT).glob("*")):
                with writing(old / LEFT / file.name) as temporary:
                    shutil.copyfile(file, temporary)
            if roles is not None:
                with writing(old / CUT) as temporary:
                    temporary.write_text(f"{bottom} {top}\n", encoding="ascii")
        recipe, ends = run.recipe(), (int(bottom), int(top))
        if (recipe.model.bottom, recipe.model.top) != ends:  # else another role of this directory was here before
            run.rewrite(recipe.moved_to(ends))
        (staged.path / READY).unlink()
    shutil.rmtree(staged.path)
    return True


def stage_servers(
    staged: RunDirectory, run: RunDirectory, move: Move, kept: Mapping[int, Sequence[Moments]]
) -> dict[int, tuple[Tensors, Moments]]:
    """Write the moved states of trunk and root of every round that both have.

    Args:
        kept: of a round, the moments that silos give away.

    Returns:
        By round, the shared tensors afterwards, and the trunk's moments before.
    """
    trunk, root = run.role("trunk"), run.role("root")
    begun = adapters.initial_tensors(Checkpoint(move.recipe.model.path).config, move.recipe)
    found: dict[int, tuple[Tensors, Moments]] = {}
    for number in sorted(trunk.rounds() & (root.rounds() | {0})):
        middle, ends = trunk.load_round(number), root.load_round(number) if number else {"shared": begun}
        moments = mean_moments(kept.get(number, ()))
        staged.role("trunk").save_round(number, move.of_trunk(middle, ends["shared"], moments))
        after = move.of_root(ends, middle["adapter"])
        if number:
            staged.role("root").save_round(number, after)
        found[number] = after["shared"], move.trunk_moments(middle)
    return found


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


def _silo_states(run: RunDirectory, number: int) -> dict[str, State]:
    """The states of the silos that have one of this round, by name."""
    return {name: run.role(name).load_round(number) for name in run.silos() if number in run.role(name).rounds()}
