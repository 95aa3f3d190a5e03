"""Capturing: a silo's own frames behind a tap, with the truth beside them; zeros where the trunk does not count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.audit.capture import capture_answers, capture_pairs, capture_rows
from isthmus.audit.target import Target
from isthmus.engines.zero_trunk import ZeroTrunk
from isthmus.errors import ProtocolError, RecipeError
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import make_recipe
from tests.unit.attacks.attacked import random_rows


@pytest.fixture
def target(attacked_model: Path) -> Target:
    return Target(make_recipe(attacked_model, silos=("a", "b"), boundary={"forward": {"noise": 0.1}}))


def test_training_rows_cross_with_their_gradients_and_claims(target: Target) -> None:
    rows = random_rows(3, 1)
    captured = capture_rows(target, "a", rows)
    assert captured.truth == tuple(tuple(row.input) for row in rows)
    assert [one.length for one in captured.crossings] == [len(row.input) for row in rows]
    assert all(one.gradient_LD is not None for one in captured.crossings)
    assert {one.weight for one in captured.crossings} == {float(sum(len(row.answer) for row in rows))}


def test_answers_cross_without_gradients(target: Target) -> None:
    rows = random_rows(2, 1)
    captured = capture_answers(target, "a", rows)
    for row, tokens, crossing in zip(rows, captured.truth, captured.crossings, strict=True):
        assert list(tokens[: len(row.prompt)]) == row.prompt
        assert crossing.kind == "inference"
        assert crossing.gradient_LD is None


def test_own_rows_can_be_drawn_with_fresh_noise(target: Target) -> None:
    one, other = capture_pairs(target, "b", random_rows(1, 2), draws=2)
    assert one.tokens == other.tokens
    assert not torch.equal(one.crossing.hidden_LD, other.crossing.hidden_LD)


def test_a_trunk_of_zeros_answers_what_a_silo_asks_between_rounds(target: Target) -> None:
    trunk = ZeroTrunk(target.recipe)
    for asked in (pb.Forward(lengths=[1, 2]), pb.Decode(lengths=[1, 2])):
        answer = trunk.handle("a", asked).result()
        assert not codec.decode(answer.hidden, rows=3, width=32, codec="fp32").any()  # type: ignore[attr-defined]
    trunk.handle("a", pb.Forward(step=7, lengths=[3], train=True, hidden=pb.Matrix(rows=3, width=4))).result()
    back = trunk.handle("a", pb.Backward(step=7, reply=True, gradient=pb.Matrix(rows=3, width=32))).result()
    assert (back.gradient.rows, back.gradient.width) == (3, 4)  # type: ignore[attr-defined]
    with pytest.raises(ProtocolError, match="Commit"):
        trunk.handle("a", pb.Commit())


def test_a_silo_that_is_none_is_refused(target: Target) -> None:
    with pytest.raises(RecipeError, match="c"):
        capture_rows(target, "c", random_rows(1, 1))
