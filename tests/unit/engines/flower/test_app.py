"""The Flower app that ``isthmus flower`` writes."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

import pytest

from isthmus.engines.flower import courier
from isthmus.engines.flower.app import PACKAGE, simulation_command, write_app
from isthmus.errors import NotSupportedError, RunError
from isthmus.recipe import Recipe
from tests.integration.processes import write_federation


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.read(write_federation(tmp_path_factory.mktemp("federation")))


def test_it_is_a_copy_of_the_courier_and_imports_no_isthmus(recipe: Recipe, tmp_path: Path) -> None:
    write_app(recipe, tmp_path / "app", root="/run/root.sock")
    source = Path(courier.__file__).parent
    copied = {path.name: path.read_text() for path in (tmp_path / "app" / PACKAGE).iterdir()}
    assert copied == {path.name: path.read_text() for path in source.glob("*.py")}
    assert not any("import isthmus" in text or "from isthmus" in text for text in copied.values())
    settings = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    assert settings["project"]["dependencies"] == ["flwr>=1.41,<1.43"]
    assert settings["tool"]["flwr"]["app"]["config"] == {"root": "/run/root.sock", "hold": 120.0, "simulate": ""}
    write_app(recipe, tmp_path / "app")  # again, over itself


def test_a_simulation_starts_its_federation(recipe: Recipe, tmp_path: Path) -> None:
    command = simulation_command(tmp_path / "a recipe.toml", tmp_path / "run")
    write_app(recipe, tmp_path / "app", simulate=command)
    settings = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    assert shlex.split(settings["tool"]["flwr"]["app"]["config"]["simulate"]) == command
    assert settings["project"]["dependencies"] == ["flwr[simulation]>=1.41,<1.43"]


def test_a_folder_with_something_else_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(RunError, match="not empty"):
        write_app(recipe, tmp_path)


def test_edges_are_refused_by_name(tmp_path: Path) -> None:
    silos = [{"name": name, "train": "north.jsonl"} for name in ("a", "b", "c", "d")]
    edges = [{"name": "left", "address": "localhost:7", "silos": ["a", "b"]}]
    edges.append({"name": "right", "address": "localhost:8", "silos": ["c", "d"]})
    written = write_federation(tmp_path, silo=silos, edge=edges, train={"evaluate": False})
    with pytest.raises(NotSupportedError, match="edges"):
        write_app(Recipe.read(written), tmp_path / "app")
