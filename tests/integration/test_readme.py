"""The README's commands, links and example work as they stand there, and each of its figures was measured.

Figures are tied to rows of ``benchmarks/results`` by ``benchmarks/readme.toml``, which explains its format at its top:
whoever adds a number to the README adds its source there (or lists its phrase among the settings).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import assert_understood, commands_in
from tests.integration.processes import run_here, write_federation
from tests.integration.readme_figures import faults, measured, read_mapping, slips, swaps

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAPPING = read_mapping(ROOT / "benchmarks" / "readme.toml")
MEASURED = measured(ROOT / "benchmarks" / "results")
COMMANDS = commands_in(README)
TARGETS = re.findall(r"^ {4}make (\w+)", README, flags=re.MULTILINE)
LINKS = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)


def test_readme_names_commands_targets_and_links() -> None:
    assert len(COMMANDS) >= 7
    assert {"demo", "test"} <= set(TARGETS)
    assert LINKS


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_understood(line: str) -> None:
    assert_understood(line)


@pytest.mark.parametrize("target", TARGETS)
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("link", LINKS)
def test_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.process
def test_python_example_runs(tmp_path: Path) -> None:
    """As its own program, beside a finished run."""
    (example,) = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)
    run_here(
        write_federation(tmp_path, train={"rounds": 1, "steps": 1, "evaluate": False}), tmp_path / "runs" / "first"
    )
    ended = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()


def test_every_figure_was_measured() -> None:
    assert faults(README, MAPPING, MEASURED) == []


def test_a_changed_last_digit_is_found() -> None:
    changed = list(slips(README))
    assert len(changed) > 100
    assert [what for readme, what in changed if not faults(readme, MAPPING, MEASURED)] == []


def test_swapped_cells_are_found() -> None:
    swapped = list(swaps(README))
    assert len(swapped) > 20
    assert [what for readme, what in swapped if not faults(readme, MAPPING, MEASURED)] == []


ROWS = {
    ("file", name): {"value": value, "goal": goal, "met": met}
    for name, value, goal, met in (("a", 0.1251, "≥ 1.5", False), ("b", 2.5, None, None))
}
SMALL = """Ours takes 2.5 s (missed: 1.5), on 2 cores.

| measured | ours | goal |
|---|---|---|
| share, % | 12.5 (missed) | 1.5 |
"""
SMALL_MAPPING: dict[str, Any] = {
    "table": [{"heading": "measured | ours | goal", "rows": {"share, %": ["100 × file: a", "goal of file: a"]}}],
    "prose": [{"text": "Ours takes {} s (missed: {})", "figures": ["file: b", "goal of file: a"]}],
    "settings": ["on 2 cores"],
}


def test_a_right_readme_has_no_faults() -> None:
    assert faults(SMALL, SMALL_MAPPING, ROWS) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("12.5", "0.1"),
        ("12.5", "12.52"),
        ("12.5", "−12.5"),
        ("12.5 (missed)", "12.5"),
        ("(missed: 1.5)", "(goal: 1.5)"),
        ("2.5 s", "2.5 s, 3 at most"),
        ("on 2 cores", "on 12 cores"),
        ("on 2 cores", "on two cores"),
        ("share, %", "share of 7, %"),
        ("| ours | goal |", "| goal | ours |"),
        (SMALL, SMALL + "\nOurs takes 2.5 s (missed: 1.5)\n"),
        (SMALL, SMALL + "| other | 12.5 (missed) | 1.5 |\n"),
        (SMALL, SMALL + "\n| other | table |\n|---|---|\n| a | 7 |\n"),
        (SMALL[SMALL.index("|") :], ""),
    ],
)
def test_a_wrong_readme_has_faults(old: str, new: str) -> None:
    assert SMALL.count(old) == 1
    assert faults(SMALL.replace(old, new), SMALL_MAPPING, ROWS)


def test_a_source_that_was_not_measured_is_a_fault() -> None:
    assert faults(SMALL, SMALL_MAPPING, {place: row for place, row in ROWS.items() if place != ("file", "b")})
