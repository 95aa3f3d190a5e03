"""What the README tells users to type works as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from isthmus.cli.main import app
from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import at_address
from isthmus.engines.roles import start_server
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from tests.integration.processes import write_federation, write_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}isthmus (.+?)(?:  +#.*)?$", README, flags=re.MULTILINE)
TARGETS = re.findall(r"^ {4}make (\w+)", README, flags=re.MULTILINE)
LINKS = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)


def test_readme_names_commands_targets_and_links() -> None:
    assert len(COMMANDS) >= 7
    assert {"demo", "test"} <= set(TARGETS)
    assert LINKS


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_understood(line: str) -> None:
    name, *arguments = shlex.split(line)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands[name].make_context(name, arguments)


@pytest.mark.parametrize("target", TARGETS)
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("link", LINKS)
def test_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.process
def test_python_example_runs(tmp_path: Path) -> None:
    """As its own program, in a folder with a recipe and certificates, against a trunk that listens."""
    (example,) = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)
    recipe = Recipe.read(write_federation(tmp_path))
    make_certificates(recipe, tmp_path / "certificates")
    server, services = start_server(at_address(recipe, "localhost:0"), RunDirectory(tmp_path / "server"), ("trunk",))
    write_recipe(tmp_path / "recipe.toml", trunk={"address": f"localhost:{server.port}"})
    ended = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    server.stop()
    services["Trunk"].stop()  # type: ignore[attr-defined]
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()


def test_every_figure_in_a_table_was_measured() -> None:
    """Each number in the README's tables is the rounding of one in ``benchmarks/results`` (accuracies: in percent)."""
    rows = [row for path in (ROOT / "benchmarks" / "results").glob("*.json") for row in json.loads(path.read_text())]
    rows = [row for row in rows if row["value"] is not None]  # an infinite epsilon has none
    known = [100 * row["value"] if row["unit"] == "accuracy" else row["value"] for row in rows]
    lines = [line.split("|", 2)[2] for line in README.splitlines() if line.startswith("|")]  # less what it is about
    figures = [figure for line in lines for figure in re.findall(r"\d+\.\d+|\d{3,}", line)]
    assert len(figures) > 30
    goals = {goal.split()[1] for row in rows if (goal := row["goal"])}
    for figure in figures:
        decimals = len(figure.partition(".")[2])
        near = any(abs(value - float(figure)) <= 0.51 * 10**-decimals for value in known)
        assert near or float(figure) in map(float, goals), figure
