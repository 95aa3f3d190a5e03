from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.errors import RunError


@pytest.mark.parametrize("command", [["generate", "text"], ["batch", "in.jsonl", "out.jsonl"], ["draft"], ["evaluate"]])
def test_a_folder_that_is_no_run_is_refused_by_name(command: list[str], tmp_path: Path) -> None:
    name, *arguments = command
    found = CliRunner().invoke(app, [name, str(tmp_path), *arguments], standalone_mode=False)
    assert isinstance(found.exception, RunError)
    assert str(tmp_path) in found.exception.message
