"""A finished run for the tests of what uses one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from isthmus.engines import opening
from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import at_address, create_run
from isthmus.engines.roles import start_server
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


@pytest.fixture
def trunk_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is opened is served by a trunk in this process."""

    @contextmanager
    def serving(run: RunDirectory, *, number: int | None = None) -> Iterator[tuple[None, str]]:
        recipe = run.recipe()
        make_certificates(recipe, Path(recipe.wire.certificates))
        server, services = start_server(at_address(recipe, "localhost:0"), run, ("trunk",), number)
        yield None, f"localhost:{server.port}"
        server.stop()
        services["Trunk"].stop()  # type: ignore[attr-defined]

    monkeypatch.setattr(opening, "serving", serving)
