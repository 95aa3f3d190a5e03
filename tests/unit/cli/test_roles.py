from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.errors import RecipeError


@pytest.mark.parametrize("command", [["silo", "nobody"], ["edge", "nobody"]])
def test_a_party_that_the_recipe_lacks_is_refused_before_anything_is_written(
    command: list[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\npath = "model"\n[[silo]]\nname = "north"\ntrain = "north.jsonl"\n')
    role, name = command
    run = tmp_path / "run"
    found = CliRunner().invoke(app, [role, str(recipe), name, "--run-dir", str(run)], standalone_mode=False)
    assert isinstance(found.exception, RecipeError)
    assert "nobody" in found.exception.message
    assert not run.exists()
