"""Labels and answers out of the boundary's gradients: by choices where there are some, else by inversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.attacks.gradients.boundary_gradients import infer_labels, read_logit_lens, recover_responses
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import View, trunk_view
from isthmus.audit.capture import capture_rows
from isthmus.audit.target import Target
from isthmus.data.tokens import Tokens
from isthmus.errors import AttackError
from tests.conftest import make_recipe
from tests.unit.attacks.attacked import Attacked, random_rows

END = 2
"""Closes every answer in free text."""


@pytest.fixture(params=[{"w40": [40], "w71": [71]}, {"w40 w9": [40, 9], "w71": [71]}], ids=["equal", "unequal"])
def labelled(attacked_model: Path, request: pytest.FixtureRequest) -> tuple[View, list[int]]:
    """Rows whose answers are choices, and which."""
    recipe = make_recipe(attacked_model, silos=("a", "b"), task={"choices": list(request.param)})
    right = [number % 2 for number in range(6)]
    tokens = list(request.param.values())
    longest = max(map(len, tokens))
    rows = [
        Tokens(row.prompt, tokens[one], filler=(0,) * (longest - len(tokens[one])))
        for row, one in zip(random_rows(6, 1), right, strict=True)
    ]
    captured = capture_rows(Target(recipe), "a", rows)
    return trunk_view(recipe, attacked_model, captured.crossings, (), {}), right


def test_clean_gradients_tell_the_choice(labelled: tuple[View, list[int]]) -> None:
    view, right = labelled
    guesses = infer_labels(Knowledge(view))
    assert guesses.by["choices"] == right
    assert set(guesses.by) == {"choices", "clusters"}
    assert guesses.clusters == {"clusters"}
    assert len(read_logit_lens(Knowledge(view)).by["lens"]) == len(right)  # type: ignore[union-attr]


def test_clean_gradients_tell_the_answer(attacked_model: Path) -> None:
    recipe = make_recipe(attacked_model, silos=("a", "b"))
    rows = [Tokens(row.prompt, [*row.answer, END]) for row in random_rows(6, 1)]
    captured = capture_rows(Target(recipe), "a", rows)
    found = recover_responses(Knowledge(trunk_view(recipe, attacked_model, captured.crossings, (), {})))
    assert found.response
    assert [len(one) for one in found.ids] == [len(row.prompt) + 2 for row in rows]
    assert sum(one[-2:] == row.answer for one, row in zip(found.ids, rows, strict=True)) >= 5


def test_free_text_has_no_labels(attacked: Attacked) -> None:
    view, _ = attacked(own=5)
    with pytest.raises(AttackError, match="free text"):
        infer_labels(Knowledge(view))
