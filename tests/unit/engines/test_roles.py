"""One role in this process: who serves where, and what is refused before anything listens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.engines import roles
from isthmus.engines.certificates import make_certificates
from isthmus.engines.lifetime import Stopped
from isthmus.engines.local import at_address
from isthmus.engines.roles import Serving, run_silo, serve, serve_edge, serve_roles, start_server
from isthmus.errors import IdentityError, RecipeError, RunError
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from tests.conftest import make_recipe, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    return recipe_of(folder, tmp_path)


def recipe_of(folder: Path, place: Path, **sections: Any) -> Recipe:
    recipe = make_recipe(folder, silos=("a", "b"), wire={"certificates": str(place / "c")}, **sections)
    make_certificates(recipe, place / "c")
    return recipe if sections else at_address(recipe, "localhost:0")


@pytest.mark.parametrize(
    ("asked", "services"), [(("trunk",), {"Trunk", "Model"}), (("trunk", "root"), {"Trunk", "Model", "Root"})]
)
def test_a_server_has_the_services_of_its_roles(
    recipe: Recipe, tmp_path: Path, asked: tuple[str, ...], services: set[str]
) -> None:
    server, found = start_server(recipe, RunDirectory(tmp_path / "run"), asked)
    server.stop()
    assert set(found) == services
    assert server.port > 0
    found["Trunk"].stop()  # type: ignore[attr-defined]


def test_what_is_served_is_announced_until_it_is_stopped(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended:
        """In an event's place: the process is asked to stop as soon as it waits."""

        def wait(self, seconds: float | None = None) -> None:
            raise Stopped

    monkeypatch.setattr(roles, "threading", SimpleNamespace(Event=Ended))
    serve_roles(recipe, RunDirectory(tmp_path / "run"), ("root",))
    assert capsys.readouterr().out.startswith("listening at localhost:")


def test_a_role_writes_the_recipe_beside_its_folder(recipe: Recipe, tmp_path: Path) -> None:
    """But the local engine's roles read that very file."""
    run = roles.recorded(tmp_path / "recipe.toml", at_address(recipe, "localhost:8"), tmp_path / "run")
    recipe = run.recipe()
    moved = at_address(recipe, "localhost:9")
    assert roles.recorded(run.recipe_path, moved, run.path).recipe() == recipe
    assert roles.recorded(tmp_path / "recipe.toml", moved, run.path).recipe() == moved


def served(path: Path, *, number: int | None = None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trunk of a run directory, until it first waits."""

    class Ended:
        def wait(self, seconds: float | None = None) -> None:
            raise Stopped

    monkeypatch.setattr(roles, "threading", SimpleNamespace(Event=Ended))
    roles.serve(path, Path("runs/trunk"), ("trunk",), "localhost:0", Serving(number))


def test_the_trunk_of_a_finished_run_is_served_and_says_what_to_do(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(tmp_path / "run", at_address(recipe, "localhost:8"))
    with pytest.raises(RunError, match="holds no trunk"):
        served(run.path, monkeypatch=monkeypatch)
    with pytest.raises(RunError, match="not a run directory"):
        served(tmp_path, monkeypatch=monkeypatch)
    server, found = start_server(recipe, run, ("trunk",))
    server.stop()
    found["Trunk"].stop()  # type: ignore[attr-defined]
    trunk, last = run.role("trunk"), recipe.train.rounds
    trunk.save_round(last - 1, trunk.load_round(0))
    capsys.readouterr()
    served(run.path, monkeypatch=monkeypatch)
    assert "finished" not in capsys.readouterr().out
    trunk.save_round(last, trunk.load_round(0))
    served(run.path, monkeypatch=monkeypatch)
    told = capsys.readouterr().out
    assert told.startswith("listening at localhost:")
    assert f"finished after {last} rounds" in told
    assert f"isthmus export {run.path} OUT (it takes the folders of trunk and root" in told
    with pytest.raises(RunError, match="has not saved round 1") as absent:
        served(run.path, number=1, monkeypatch=monkeypatch)
    assert absent.value.remedy == f"name one of these: 0, {last - 1}, {last}"
    with pytest.raises(RecipeError, match="both"):
        roles.serve(run.path, tmp_path / "another", ("trunk",), None)


def test_one_process_has_one_address(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path, root={"address": "localhost:1"})
    with pytest.raises(RecipeError, match="one process has one address"):
        serve_roles(recipe, RunDirectory(tmp_path / "run"), ("trunk", "root"))


def test_nobody_serves_without_a_certificate(folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe(folder, wire={"certificates": str(tmp_path / "none")})
    with pytest.raises(IdentityError):
        start_server(recipe, RunDirectory(tmp_path / "run"), ("trunk",))


def test_an_edge_is_one_of_the_recipes(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no edge 'middle'"):
        serve_edge(recipe, RunDirectory(tmp_path / "run"), "middle")


@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_is_closed_however_it_ends(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    done: list[str] = []

    class Worker:
        def __init__(self, recipe: Recipe, name: str, directory: object, *, root: object, endless: bool) -> None:
            done.append(name)

        def run(self) -> int:
            if fails:
                raise RecipeError("no", remedy="none")
            return recipe.train.rounds

        def close(self) -> None:
            done.append("closed")

    monkeypatch.setattr(roles, "Worker", Worker)
    if fails:
        with pytest.raises(RecipeError):
            run_silo(recipe, RunDirectory(tmp_path / "run"), "a")
    else:
        run_silo(recipe, RunDirectory(tmp_path / "run"), "a")
    assert done == ["a", "closed"]
    told = capsys.readouterr().out
    assert ("next: isthmus generate" in told) == (not fails)


@pytest.mark.parametrize("roles", [("trunk",), ("trunk", "root")], ids=["no root", "finished"])
def test_flower_without_rounds_to_carry_is_refused(roles: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path if "root" in roles else tmp_path / "recipe.toml"
    with pytest.raises(RecipeError, match="none that leads any"):
        serve(path, tmp_path / "run", roles, None, Serving(flower=tmp_path / "root.sock"))
