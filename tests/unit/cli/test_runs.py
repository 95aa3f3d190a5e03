from __future__ import annotations

import pytest
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.errors import RecipeError


@pytest.mark.parametrize("arguments", [[], ["recipe.toml", "--resume", "runs/first"]])
def test_a_run_takes_a_recipe_or_a_run_to_resume(arguments: list[str]) -> None:
    found = CliRunner().invoke(app, ["run", *arguments], standalone_mode=False)
    assert isinstance(found.exception, RecipeError)
    assert "isthmus run --resume DIR" in found.exception.remedy
