"""A finished run for the tests of what uses one."""

from __future__ import annotations

import pytest

from isthmus.engines.local import create_run
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from tests.integration.processes import train_here, write_federation


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Of one short round."""
    folder = tmp_path_factory.mktemp("federation")
    recipe = Recipe.read(write_federation(folder, train={"rounds": 1, "steps": 2, "evaluate": False}))
    made = create_run(recipe, folder / "run")
    train_here(made)
    return made
