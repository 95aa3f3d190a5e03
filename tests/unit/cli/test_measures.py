from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.errors import RunError


def test_a_recipe_in_place_of_a_run_directory_is_told_of_the_plan(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    found = CliRunner().invoke(app, ["privacy", str(tmp_path / "recipe.toml")], standalone_mode=False)
    assert isinstance(found.exception, RunError)
    assert "--plan" in found.exception.remedy
