"""``[[silo]]``: names and numbers of steps."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import changed, least, refused


@pytest.mark.parametrize("name", ["A", "-a", "_a", "a b", "a/b", "../a", "a.b", "ä", "a\n", "a" * 64, ""])
def test_a_name_that_could_not_be_a_folder_or_a_certificate(name: str) -> None:
    error = refused(changed(least(), {"silo.0.name": name}))
    assert error.message.startswith("silo.0.name = ")
    assert "lower-case letters, digits" in error.message


@pytest.mark.parametrize("name", ["x", "0", "north-1", "a_b", "a" * 63])
def test_a_good_name(name: str) -> None:
    assert Recipe.of(changed(least(), {"silo.0.name": name})).silo[0].name == name


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_a_wrong_number_of_steps_names_its_silo(steps: Any) -> None:
    assert refused(changed(least(), {"silo.1.steps": steps})).message.startswith("silo.1.steps = ")
