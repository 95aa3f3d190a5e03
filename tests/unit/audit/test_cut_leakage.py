"""The share of a silo's tokens that an attack recovers at a cut; what all prompts share does not count."""

from __future__ import annotations

from pathlib import Path

import torch

from isthmus.audit.cut_leakage import measured_leakage
from isthmus.audit.cut_probe import AttackRows
from isthmus.data.tokens import Tokens
from isthmus.engines.cuts import CutFigures
from tests.conftest import VOCABULARY, make_recipe


def rows_of_words(count: int, seed: int, before: list[int]) -> list[Tokens]:
    draw = torch.Generator().manual_seed(seed)
    texts = torch.randint(4, VOCABULARY, (count, 6), generator=draw).tolist()
    return [Tokens(before + text[:-1], text[-1:]) for text in texts]


def test_a_long_common_beginning_does_not_count(attacked_model: Path) -> None:
    """Under noise that hides the words, an attack that learned the common beginning by heart has recovered nothing."""
    recipe = make_recipe(attacked_model, silos=("a", "b"), boundary={"forward": {"noise": 1000.0}})
    before = list(range(10, 30))
    own = AttackRows(rows_of_words(8, 1, before), rows_of_words(30, 2, before))
    found = measured_leakage(CutFigures(1, 1, memory=7), recipe, "a", own, ["linear"])
    assert found.leakage is not None
    assert found.leakage < 0.3
    assert (found.memory, found.attack, found.attacked_rows, found.known_rows) == (7, "linear", 8, 30)


def test_clean_hidden_states_are_read(attacked_model: Path) -> None:
    own = AttackRows(rows_of_words(8, 1, []), rows_of_words(120, 2, []))
    found = measured_leakage(CutFigures(1, 1), make_recipe(attacked_model, silos=("a", "b")), "a", own, ["matching"])
    assert found.leakage is not None
    assert found.leakage > 0.9
