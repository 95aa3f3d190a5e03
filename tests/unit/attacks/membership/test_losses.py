"""Membership scores by losses: against the public model, and with references by likelihood too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.membership.losses import infer_membership
from isthmus.attacks.view.view import TokenRow, View, outsider_view
from isthmus.errors import AttackError
from tests.conftest import make_recipe
from tests.unit.attacks.attacked import random_rows


@pytest.fixture
def view(attacked_model: Path) -> View:
    rows = tuple(TokenRow(tuple(row.prompt), tuple(row.answer)) for row in random_rows(6, 4))
    recipe = make_recipe(attacked_model, train={"rounds": 1, "steps": 1, "batch": 2})
    return outsider_view(recipe, attacked_model, {}, {}, rows[:3], rows[3:])


def test_untrained_models_make_nobody_a_member(view: View) -> None:
    scores = infer_membership(Knowledge(replace(view, reference_rows=())))
    assert set(scores.by) == {"loss", "difficulty"}
    assert scores.by["difficulty"] == pytest.approx([0.0] * 3, abs=1e-4), "the final model is the public one"
    assert "no likelihood ratio" in scores.notes[0]


def test_with_two_references_likelihoods_are_told(view: View) -> None:
    scores = infer_membership(Knowledge(view, references=2))
    assert {len(row) for row in scores.by.values()} == {3}
    assert "likelihood" in scores.by


def test_without_candidates_there_is_nobody_to_ask_about(view: View) -> None:
    with pytest.raises(AttackError, match="candidates"):
        infer_membership(Knowledge(replace(view, candidates=())))
