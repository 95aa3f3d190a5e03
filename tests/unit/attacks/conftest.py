"""A tiny model whose parts the attacks' victims are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import save_tiny_model
from tests.oracle.twins import save_vivid_model
from tests.unit.attacks.victims import Parts, load_parts

PartsOf = Callable[[str], Parts]


@pytest.fixture(scope="package")
def parts_of(tmp_path_factory: pytest.TempPathFactory) -> PartsOf:
    """The parts of a family's tiny model, cut (1, 1), loaded once."""
    loaded: dict[str, Parts] = {}

    def parts(family: str) -> Parts:
        if family not in loaded:
            loaded[family] = load_parts(save_vivid_model(family, Path(tmp_path_factory.mktemp(family))))
        return loaded[family]

    return parts


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny uncut model's folder."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny"), blocks=2)
