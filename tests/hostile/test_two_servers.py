"""Two processes of one role on one run directory: the second one is refused before it reads or writes anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.engines.roles import alone, run_silo, serve_edge, serve_roles
from isthmus.errors import RunError
from isthmus.recipe import Recipe
from isthmus.storage import record
from isthmus.storage.record import RunDirectory
from tests.conftest import make_recipe

EDGE = {"name": "middle", "address": "localhost:1", "silos": ["a", "b"]}
STARTS: dict[str, Callable[[Recipe, RunDirectory], None]] = {
    "trunk": lambda recipe, run: serve_roles(recipe, run, ("trunk",)),
    "root": lambda recipe, run: serve_roles(recipe, run, ("root",)),
    "middle": lambda recipe, run: serve_edge(recipe, run, "middle"),
    "a": lambda recipe, run: run_silo(recipe, run, "a"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr(record, "LOCK_SECONDS", 0.0)
    return RunDirectory.create(tmp_path / "run", make_recipe(Path("/models/tiny"), silos=("a", "b"), edge=[EDGE]))


@pytest.mark.parametrize("role", STARTS)
def test_the_second_of_a_role_is_refused_by_name(run: RunDirectory, role: str) -> None:
    recipe = run.recipe()
    with alone(run, (role,)):
        with pytest.raises(RunError, match=f"another process of {role} uses") as refused:
            STARTS[role](recipe, run)
        with alone(run, ("another",)):
            pass
    assert refused.value.remedy
    assert not (run.path / role).exists()
    assert not (run.path / "silos").exists()
    with alone(run, (role,)):
        pass


@pytest.mark.parametrize("role", STARTS)
def test_a_role_and_the_local_engine_lock_each_other_out(run: RunDirectory, role: str) -> None:
    with run.locked(), pytest.raises(RunError, match="another run is still going on"):
        STARTS[role](run.recipe(), run)
    with alone(run, (role,)), pytest.raises(RunError, match="or its result is in use"), run.locked():
        pass
