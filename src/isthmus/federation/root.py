"""The root: the one aggregator that knows the shared adapters."""

from __future__ import annotations

import torch

from isthmus.federation.aggregator import Aggregator
from isthmus.federation.planner import Course
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.storage.record import RoleDirectory
from isthmus.wire.identity import Identity


class RootService(Aggregator):
    """It holds no weights: it needs the model's configuration only.

    Args:
        identity: of the process, to check what silos sign where updates are masked; left out, the root's own.
    """

    def __init__(self, recipe: Recipe, directory: RoleDirectory, identity: Identity | None = None) -> None:
        super().__init__(recipe, ROOT, Course(recipe, shared_tensors(recipe), directory), identity)


def shared_tensors(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The adapter tensors that the silos of this recipe share, as each of them starts with them."""
    config = Checkpoint(recipe.model.path).config
    shared = adapters.shared_shapes(adapters.empty_ends(config, recipe))
    return {name: tensor for name, tensor in adapters.initial_tensors(config, recipe).items() if name in shared}
