"""The trunk's side of answers as differences: each silo's own, and whole wherever the silo has another copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.model.answers import NONE, decode_answers, digest
from isthmus.recipe import Recipe
from isthmus.trunk.earlier_answers import EarlierAnswers
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import make_recipe

WIDTH, CODEC = 32, "range-0.5"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(
        tmp_path,
        lora={"freeze_bottom": True},
        boundary={"release_once": True, "differences": True, "codec": {"forward_down": CODEC}},
    )


def asked(*named: int) -> pb.Forward:
    return pb.Forward(step=1, lengths=[6] * len(named), examples=range(1, len(named) + 1), answered=named)


def drawn(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_an_answer_is_a_difference_once_the_silo_names_the_one_before(recipe: Recipe, tmp_path: Path) -> None:
    earlier, h_TD = EarlierAnswers(tmp_path, recipe, WIDTH), drawn(12)
    first = earlier.encode("a", asked(NONE, NONE), h_TD)
    assert not first.changed
    own = [row.bfloat16() for row in decode_answers(first, [6, 6], [None, None], CODEC, WIDTH)]
    second = earlier.encode("a", asked(*map(digest, own)), h_TD + 0.01)
    assert list(second.changed) == [0, 1]
    assert not second.HasField("hidden")
    found = torch.cat(decode_answers(second, [6, 6], own, CODEC, WIDTH))
    assert (found - h_TD).abs().max() < 1.0


def test_a_silo_that_lost_its_copy_or_never_got_it_is_answered_whole(recipe: Recipe, tmp_path: Path) -> None:
    earlier, h_TD = EarlierAnswers(tmp_path, recipe, WIDTH), drawn(12)
    own = decode_answers(earlier.encode("a", asked(NONE, NONE), h_TD), [6, 6], [None, None], CODEC, WIDTH)
    named = [digest(row.bfloat16()) for row in own]
    earlier.encode("a", asked(*named), h_TD + 1)  # an answer that does not arrive
    assert not earlier.encode("a", asked(*named), h_TD).changed
    mixed = earlier.encode("a", asked(NONE, 12345), h_TD)
    assert not mixed.changed


def test_silos_do_not_share_answers_and_a_restarted_trunk_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    h_TD = drawn(6)
    first = EarlierAnswers(tmp_path, recipe, WIDTH).encode("a", asked(NONE), h_TD)
    (own,) = decode_answers(first, [6], [None], CODEC, WIDTH)
    again = EarlierAnswers(tmp_path, recipe, WIDTH)
    assert not again.encode("b", asked(digest(own.bfloat16())), h_TD).changed
    assert list(again.encode("a", asked(digest(own.bfloat16())), h_TD).changed) == [0]
