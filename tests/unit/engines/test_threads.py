"""Threads: those of torch are the recipe's, and idle ones of OpenMP soon sleep."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from isthmus.engines.threads import SPINS, set_threads, share_cores
from isthmus.errors import RecipeError
from tests.conftest import make_recipe


def test_spins_are_few_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "5"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == SPINS


@pytest.mark.parametrize(("threads", "given"), [(None, None), (2, 2)])
def test_torch_gets_the_recipes_number(threads: int | None, given: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    set_threads(make_recipe(Path("none"), threads=threads))
    assert told == ([] if given is None else [given])


def test_no_threads_at_all_are_refused() -> None:
    with pytest.raises(RecipeError, match="threads"):
        make_recipe(Path("none"), threads=0)
