"""Model folders and twins that the oracle tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_recipe, save_tiny_model, targets_of
from tests.oracle.twins import Twins, make_twins, save_vivid_model

Models = Callable[..., Path]
BuildTwins = Callable[..., Twins]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a tiny model of a family, written once: ``models("llama", tie_word_embeddings=True)``."""
    folders: dict[str, Path] = {}

    def folder_of(family: str, *, vivid: bool = True, **config: Any) -> Path:
        key = f"{family} {vivid} {config}"
        if key not in folders:
            save = save_vivid_model if vivid else save_tiny_model
            folders[key] = save(family, tmp_path_factory.mktemp(family), **config)
        return folders[key]

    return folder_of


@pytest.fixture(scope="session")
def build(models: Models, tmp_path_factory: pytest.TempPathFactory) -> BuildTwins:
    """Twins of a family at a cut: ``build("llama", (1, 2))``, with ``sections`` in the recipe; the caller closes."""

    def twins(
        family: str,
        cut: tuple[int, int],
        *,
        sections: dict[str, Any] | None = None,
        vivid: bool = True,
        **how: Any,
    ) -> Twins:
        settings: dict[str, Any] = dict(sections or {})
        settings["lora"] = {"targets": targets_of(family), **settings.get("lora", {})}
        settings["model"] = {"bottom": cut[0], "top": cut[1], **settings.get("model", {})}
        recipe = make_recipe(models(family, vivid=vivid), **settings)
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
