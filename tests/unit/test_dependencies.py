"""Every package that the source imports is declared in ``pyproject.toml``, and the core needs no extra."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import isthmus

SOURCE = Path(isthmus.__file__).parent
DECLARED = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
BROUGHT_BY_TORCH = {"triton"}
"""Packages that some builds of torch bring, and whose absence the source allows for."""
IN_FLOWER = Path("engines/flower/courier")
"""Files that run in an environment of Flower's, and import flwr and nothing else that is not Python's own."""
ROOMS_OF_EXTRAS = {
    "tasks": "evaluate",
    "attacks": "audit",
    "audit": "audit",
    "data": "data",
    "demo": "demo",
    "gateway": "gateway",
    "model": "bits",
}


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[]", one)[0].lower().replace("_", "-") for one in requirements}


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, at its head or in a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"isthmus"}


def test_every_import_is_declared() -> None:
    of_module = {
        name: {one.lower().replace("_", "-") for one in found} for name, found in packages_distributions().items()
    }
    extras = DECLARED["optional-dependencies"]
    undeclared = []
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0]
        allowed = distributions(DECLARED["dependencies"] + extras.get(ROOMS_OF_EXTRAS.get(room, ""), []))
        if path.relative_to(SOURCE).parent == IN_FLOWER:
            allowed = {"flwr"}
        undeclared += [
            (str(path.relative_to(SOURCE)), name)
            for name in imported(path) - BROUGHT_BY_TORCH
            if not of_module.get(name, {name}) & allowed
        ]
    assert undeclared == []
