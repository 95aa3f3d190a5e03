"""The federation that is attacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from isthmus.errors import RunError
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Target:
    """A recipe and, if it has run, its run directory."""

    recipe: Recipe
    run: RunDirectory | None = None

    @property
    def completed(self) -> int:
        """Number of finished rounds; 0 for a recipe that has not run."""
        return self.run.completed() if self.run is not None else 0

    def shared(self) -> Tensors:
        """The adapters of bottom and top after the last finished round, by uncut name; empty before the first."""
        return self._round("root")["shared"]

    def trunk_adapter(self) -> Tensors:
        """The trunk's adapter after the last finished round, by uncut name; empty before the first."""
        return self._round("trunk")["adapter"]

    def _round(self, role: str) -> dict[str, Tensors]:
        if self.run is None or not self.completed:
            return {"shared": {}, "adapter": {}}
        return self.run.role(role).load_round(self.completed)


def open_target(path: Path) -> Target:
    """The target at a path: a run directory, or a recipe file.

    Raises:
        RunError: the folder is not a run directory, or one party's own, which lacks the trunk's or the root's part.
        RecipeError: the file is not a valid recipe.
    """
    if path.is_dir():
        run = RunDirectory.open(path)
        if run.deployed and not run.served_here:
            raise RunError(
                f"{run.path} lacks what the trunk or the root learned",
                remedy="attack the run directory of 'isthmus run', or the recipe, which has not learned",
            )
        return Target(run.recipe(), run)
    return Target(Recipe.read(path))
