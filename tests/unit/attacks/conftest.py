"""What the tests of the attacks share: a tiny model's parts, and a tiny federation of two silos, captured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.attacks.view.view import View, colluding_view, trunk_view
from isthmus.audit.capture import capture_pairs, capture_rows
from isthmus.audit.target import Target
from tests.conftest import make_recipe, save_tiny_model, write_rows
from tests.oracle.twins import save_vivid_model
from tests.unit.attacks.attacked import Attacked, Truth, random_rows, say
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


@pytest.fixture(scope="session")
def attacked_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("attacked"), initializer_range=0.3)


@pytest.fixture
def attacked(attacked_model: Path) -> Attacked:
    """The view of the trunk with a colluding silo, and the truth: ``attacked(noise=0.1, codec="int8")``."""

    def build(*, noise: float = 0.0, own: int = 60, draws: int = 1, **boundary: Any) -> tuple[View, Truth]:
        recipe = make_recipe(attacked_model, silos=("a", "b"), boundary={"forward": {"noise": noise}, **boundary})
        source, rows = Target(recipe), random_rows(8, 1)
        captured = capture_rows(source, "a", rows)
        alone = trunk_view(recipe, attacked_model, captured.crossings, (), {})
        view = colluding_view(alone, capture_pairs(source, "b", random_rows(own, 2), draws=draws), {})
        return view, [list(row) for row in captured.truth]

    return build


@pytest.fixture
def two_silos(attacked_model: Path, tmp_path: Path) -> Target:
    """A recipe with rows on disk."""
    rows = {
        name: write_rows(
            tmp_path / f"{name}.jsonl",
            [{"prompt": say(row.prompt) + " w5 w6", "answer": say(row.answer)} for row in random_rows(40, seed, 8)],
        )
        for seed, name in enumerate("ab")
    }
    recipe = make_recipe(
        attacked_model,
        silo=[{"name": name, "train": str(path)} for name, path in rows.items()],
        train={"steps": 2, "rounds": 1, "learning_rate": 0.05},
        root={"minimum": 1, "patience": 0.2},
        boundary={"forward": {"noise": 0.01}},
    )
    return Target(recipe)
