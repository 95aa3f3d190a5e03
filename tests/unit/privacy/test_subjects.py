"""Subjects: the records of a tensor's rows. Rows are counted over sequences; nothing can be changed afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from isthmus.privacy.subjects import Subjects


def test_rows_are_those_of_all_sequences() -> None:
    assert Subjects(("a", "b"), (3, 4)).rows == 7
    assert Subjects((), ()).rows == 0


def test_factors_and_budgets_are_the_recipes_unless_given() -> None:
    plain = Subjects(("a",), (2,))
    assert plain.factors_T is None
    assert plain.budgets is None
    assert torch.equal(Subjects(("a",), (2,), torch.ones(2)).factors_T, torch.ones(2))  # type: ignore[arg-type]


def test_they_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Subjects(("a",), (2,)).records = ("b",)  # type: ignore[misc]
