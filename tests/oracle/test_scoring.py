"""Choices scored with a split model, its caches repeated and cropped on both sides, as with the uncut one."""

from __future__ import annotations

import random

import pytest

from isthmus.tasks import scoring
from isthmus.tasks.scoring import ChoiceQuestion, choice_log_probs
from tests.conftest import VOCABULARY
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import FAMILIES


def questions() -> list[ChoiceQuestion]:
    draw = random.Random(0)

    def tokens(most: int) -> list[int]:
        return [draw.randrange(4, VOCABULARY) for _ in range(draw.randint(1, most))]

    return [ChoiceQuestion(tokens(24), [tokens(4) for _ in range(draw.randint(1, 5))]) for _ in range(7)]


@pytest.mark.parametrize("room", [8192, 60])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_the_uncut_models(
    family: str, room: int, twins_of: BuildTwins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SCORED_TOKENS", room)
    twins = twins_of(family, (1, 2))
    split, whole = (choice_log_probs(model, questions()) for model in twins.both)
    for scores, expected in zip(split, whole, strict=True):
        assert scores == pytest.approx(expected, abs=2e-3, rel=1e-5)
    assert len(twins.service._sessions) <= 1, "the last is closed with the next one's first frame"
