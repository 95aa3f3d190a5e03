"""A root that numbers rounds as it likes: a silo would save its state under that number, in place of earlier ones, and
train at other rates. It refuses, before anything crosses, and goes on with an honest root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import ProtocolError
from isthmus.storage.record import RunDirectory
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import save_tiny_model
from tests.hostile.test_steering import ROUNDS, Lie, honest, parties, recipe_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


def numbered(number: int, of: int) -> Lie:
    """The plan after so many rounds is for this round."""

    def lie(answer: Any) -> None:
        if isinstance(answer, pb.Plan) and answer.completed == of:
            answer.round = number

    return lie


@pytest.mark.parametrize(
    ("number", "of"),
    [(2, 0), (2**31, 0), (1, 1), (3, 1), (ROUNDS + 1, ROUNDS), (2**32 - 1, 2)],
    ids=["the next but one", "2^31", "the same again", "one left out", "one more than there are", "the largest number"],
)
def test_a_plan_for_another_round_than_the_next_is_refused(number: int, of: int, model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, tmp_path)
    run = RunDirectory.create(tmp_path / "run", recipe)
    told = f"a plan for round {number} of {ROUNDS} with the adapters after round {of}"
    with (
        parties(recipe, run, numbered(number, of)) as (worker, way),
        pytest.raises(ProtocolError, match=told) as caught,
    ):
        worker.run()
    assert caught.value.remedy
    assert way.crossed == of  # one step a round: those of honest rounds
    kept = run.role("a").rounds()
    assert kept <= set(range(of + 1))
    with parties(recipe, run, honest) as (worker, way):
        worker.run()
    assert run.completed() == ROUNDS
    assert run.role("a").last_round() == ROUNDS
