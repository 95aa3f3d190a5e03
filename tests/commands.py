"""Commands as documents and deployment files show them, held against the command line."""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer

from isthmus.cli.main import app


def commands_in(document: str) -> list[str]:
    """The commands of ``isthmus`` in a document's indented lines, without the program's name and comments."""
    return re.findall(r"^ {4}isthmus (.+?)(?:  +#.*)?$", document, flags=re.MULTILINE)


def assert_understood(line: str) -> None:
    """Assert that the command line takes this command, as ``run recipe.toml --run-dir runs/first``."""
    command: Any = typer.main.get_command(app)
    arguments = shlex.split(line)
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context(command.name, arguments)
