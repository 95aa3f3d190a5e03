"""The documentation as a site: it builds without a warning, has every page, and its tutorials' commands are right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import assert_understood, commands_in

ROOT = Path(__file__).parents[3]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
SHOWN = [*TUTORIALS, *sorted((ROOT / "docs" / "features").glob("*.md"))]
COMMANDS = [(page.stem, line) for page in SHOWN for line in commands_in(page.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a broken link or anchor ends the build."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_there_once_and_in_the_navigation(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages = {page.removesuffix("/index") for page in pages} | {"CHANGELOG", "CONTRIBUTING", "benchmarks/RESULTS"}
    home = (site / "index.html").read_text(encoding="utf-8")
    for page in pages:
        assert (site / page / "index.html").exists(), page
        assert f'href="{page}/"' in home, page


def test_the_reference_has_the_docstrings(site: Path) -> None:
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("open_run", "join.join", "Silo.prompt", "Recipe.read", "IsthmusError", "BudgetExhausted"):
        assert name in text


def test_files_that_pages_link_to_are_there(site: Path) -> None:
    copied = (site / "files" / "recipes" / "private.toml").read_bytes()
    assert copied == (ROOT / "recipes" / "private.toml").read_bytes()


def test_every_scenario_has_a_tutorial() -> None:
    scenarios = {"hospital-notes", "paper-questions", "bank-intents", "sentiment", "private-inference", "llama-2-7b"}
    assert {page.stem for page in TUTORIALS} == scenarios | {"index"}
    for name in scenarios:
        assert f"--example {name}" in (ROOT / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: value)
def test_command_is_understood(page: str, line: str) -> None:
    assert_understood(line)
