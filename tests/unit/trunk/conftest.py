"""A small model for the trunk's tests, and services with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_recipe, save_tiny_model
from tests.unit.trunk.talk import Build, Trunk


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture
def build(model: Path, tmp_path: Path) -> Iterator[Build]:
    built: list[Trunk] = []

    def make(**section: Any) -> Trunk:
        recipe = make_recipe(model, silos=("a", "b", "c", "d"), trunk=section)
        built.append(Trunk(recipe, tmp_path / str(len(built))))
        return built[-1]

    yield make
    for trunk in built:
        trunk.service.stop()
