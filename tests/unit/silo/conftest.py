"""What the tests of releasing once share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_recipe, save_tiny_model
from tests.unit.silo.parties import Party, Start


@pytest.fixture(scope="module")
def once_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture
def start(once_model: Path, tmp_path: Path) -> Iterator[Start]:
    """A trunk and a silo: ``start(noise=0.1, codec="int8", kept_bytes=3000)``."""
    started: list[Party] = []

    def party(
        *, noise: float = 0.1, codec: str = "fp32", kept_bytes: int = 2**30, ledger: Any = None, **sections: Any
    ) -> Party:
        boundary = {"release_once": True, "forward": {"noise": noise}, "codec": codec}
        boundary |= sections.pop("boundary", {})
        recipe = make_recipe(
            once_model,
            lora={"freeze_bottom": True},
            boundary=boundary,
            trunk={"kept_bytes": kept_bytes},
            **{"train": {"steps": 99}, **sections},
        )
        started.append(Party(recipe, tmp_path / f"party{len(started)}", ledger=ledger))
        return started[-1]

    yield party
    for one in started:
        one.service.stop()
