"""``tests/unit`` mirrors ``src/isthmus``: a module's own tests stand where the module does, under its name."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE, UNIT = ROOT / "src" / "isthmus", Path(__file__).parent
GENERATED = {"wire/isthmus_pb2.py"}
ELSEWHERE = {"benchmarks", "docs"}
"""Folders of tests whose subjects lie beside the package: each has a folder of its name there."""
WITHOUT_MODULE = {"test_dependencies.py", "test_mirror.py", "test_names.py", "test_pairwise.py"}
"""Tests of the package as a whole, and of the tests' own tools."""


def _modules() -> set[str]:
    found = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if not path.name.startswith("__")}
    return found - GENERATED


def _tested() -> set[str]:
    """The module that each test file is about, by its name."""
    files = [path.relative_to(UNIT) for path in UNIT.rglob("test_*.py")]
    return {
        path.with_name(path.name.removeprefix("test_")).as_posix()
        for path in files
        if path.parts[0] not in ELSEWHERE and path.as_posix() not in WITHOUT_MODULE
    }


def test_every_module_has_tests_of_its_own() -> None:
    assert not sorted(_modules() - _tested())


def test_no_test_is_about_a_module_that_is_not_there() -> None:
    assert not sorted(_tested() - _modules())


def test_what_stands_elsewhere_does() -> None:
    assert all((ROOT / folder).is_dir() for folder in ELSEWHERE)
    assert all((UNIT / name).exists() for name in WITHOUT_MODULE)
