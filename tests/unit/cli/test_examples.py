"""Each command's help shows an example that the command takes."""

from __future__ import annotations

import shlex

import pytest
import typer
from typer.testing import CliRunner

from isthmus.cli.examples import COMMAND_EXAMPLES, EXIT_CODES
from isthmus.cli.main import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_each_command_has_one() -> None:
    assert COMMAND_EXAMPLES.keys() == COMMANDS.keys()
    assert EXIT_CODES in " ".join(CliRunner().invoke(app, ["--help"]).output.split())


@pytest.mark.parametrize("name", COMMAND_EXAMPLES)
def test_the_command_takes_it(name: str) -> None:
    called, *arguments = shlex.split(COMMAND_EXAMPLES[name])
    assert called == name
    COMMANDS[name].make_context(name, arguments)  # raises on what the command does not know
    shown = " ".join(CliRunner().invoke(app, [name, "--help"]).output.split())
    assert f"Example: isthmus {COMMAND_EXAMPLES[name]}" in shown
