"""Model folders and twins that the oracle tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_recipe, targets_of
from tests.oracle.twins import Twins, make_twins, save_vivid_model

Models = Callable[..., Path]
BuildTwins = Callable[..., Twins]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a tiny model of a family, written once: ``models("llama", tie_word_embeddings=True)``."""
    folders: dict[str, Path] = {}

    def folder_of(family: str, **config: Any) -> Path:
        key = f"{family} {config}"
        if key not in folders:
            folders[key] = save_vivid_model(family, tmp_path_factory.mktemp(family), **config)
        return folders[key]

    return folder_of


@pytest.fixture(scope="session")
def build(models: Models, tmp_path_factory: pytest.TempPathFactory) -> BuildTwins:
    """Twins of a family at a cut: ``build("llama", (1, 2))``; ``sections`` go into the recipe. The caller closes them."""

    def twins(family: str, cut: tuple[int, int], *, sections: dict[str, Any] | None = None, **how: Any) -> Twins:
        settings = {"lora": {"targets": targets_of(family)}, "model": {"bottom": cut[0], "top": cut[1]}}
        recipe = make_recipe(models(family), **settings, **(sections or {}))
        return make_twins(recipe, tmp_path_factory.mktemp("trunk"), **how)

    return twins


@pytest.fixture
def twins_of(build: BuildTwins) -> Iterator[BuildTwins]:
    """As ``build``, closed when the test ends."""
    built: list[Twins] = []

    def twins(*arguments: Any, **options: Any) -> Twins:
        built.append(build(*arguments, **options))
        return built[-1]

    yield twins
    for one in built:
        one.close()
