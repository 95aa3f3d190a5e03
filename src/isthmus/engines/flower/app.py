"""``isthmus flower``: writes the Flower app of a recipe's federation."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import isthmus
from isthmus.engines.flower.courier.delivery import SUPPORTED
from isthmus.errors import NotSupportedError, RunError
from isthmus.recipe import Recipe
from isthmus.storage.files import private_folder

PACKAGE = "isthmus_courier"
"""The app's Python package."""
HOLD = 120.0
"""Seconds after which a silo that works answers that it does. A message that is lost is noticed so much later."""
_PROJECT = """\
# The Flower app of an isthmus federation, written by 'isthmus flower'. It carries messages and knows nothing of them.
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = {name}
version = {version}
description = "Carries the frames of an isthmus federation"
license = {{ text = "Apache-2.0" }}
dependencies = [{dependencies}]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "isthmus"

[tool.flwr.app.components]
serverapp = "{package}.server_app:server"
clientapp = "{package}.client_app:client"

[tool.flwr.app.config]
root = {root}          # the socket of 'isthmus root RECIPE --flower SOCKET', beside the SuperLink
hold = {hold}        # seconds after which a silo that works answers that it does; a lost message is noticed later still
simulate = {simulate}  # the command that starts the whole federation for Flower's simulation; empty: a deployment
"""


def write_app(recipe: Recipe, out: Path, *, root: str = "", simulate: Sequence[str] = ()) -> None:
    """Write the app to a new or empty folder.

    Args:
        root: the root's socket; empty: named when the app is run.
        simulate: the command that starts the federation in a simulation; empty: the app is for a deployment.

    Raises:
        NotSupportedError: the recipe has edges, or moves its cut.
        RunError: the folder holds something else.
    """
    check_carried(recipe)
    if out.exists() and any(one.name != "pyproject.toml" and one.name != PACKAGE for one in out.iterdir()):
        raise RunError(f"{out} is not empty", remedy="name a new folder")
    package = out / PACKAGE
    private_folder(package)
    for one in resources.files("isthmus.engines.flower.courier").iterdir():
        if one.name.endswith(".py"):
            (package / one.name).write_text(one.read_text(encoding="utf-8"), encoding="utf-8")
    (out / "pyproject.toml").write_text(_project(out.resolve().name, root, simulate), encoding="utf-8")


def simulation_command(recipe: Path, run_dir: Path) -> list[str]:
    """What starts the recipe's federation for a simulation; the run directory holds the socket, too."""
    run = run_dir.resolve()
    module = "isthmus.engines.flower.simulated"
    return [sys.executable, "-m", module, str(recipe.resolve()), str(run), str(run / "flower.sock")]


def check_carried(recipe: Recipe) -> None:
    """Raise ``NotSupportedError`` for a recipe that Flower cannot carry."""
    if recipe.edge:
        raise NotSupportedError(
            "Flower carries frames between silos and the root, and this recipe has edges between them",
            remedy="leave out [[edge]], or run the parties without Flower (docs/features/deploying.md)",
        )
    if recipe.model.moves:
        raise NotSupportedError(
            "Flower carries rounds alone, and model.moves has parties exchange blocks between them",
            remedy="leave out model.moves, or run the parties without Flower",
        )


def _project(name: str, root: str, simulate: Sequence[str]) -> str:
    first, last = SUPPORTED[0], SUPPORTED[-1]
    major, minor = last.split(".")
    extra = "[simulation]" if simulate else ""
    return _PROJECT.format(
        name=json.dumps(re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-") or "isthmus"),
        version=json.dumps(isthmus.__version__),
        dependencies=json.dumps(f"flwr{extra}>={first},<{major}.{int(minor) + 1}"),
        package=PACKAGE,
        root=json.dumps(root),
        hold=HOLD,
        simulate=json.dumps(shlex.join(simulate)),
    )
