"""A step in micro-batches is the step of the whole batch, however many parts there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.data.tokens import Tokens, collate
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import train_step
from tests.conftest import Split, make_recipe, save_tiny_model

ROWS = [Tokens([5, 6, 7], [8]), Tokens([9], [10, 11]), Tokens([12, 13], [14])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


def stepped(folder: Path, split: Split, seed: int, step: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The step, and what trained after it, of a model of its own."""
    model, _ = split(make_recipe(folder, seed=seed))
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    done = step(model, torch.optim.SGD(trained.values(), lr=0.1), collate(ROWS, 0))
    return done, {name: one.detach().clone() for name, one in trained.items()}


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_it_is_the_step_of_the_whole_batch(folder: Path, split: Split, parts: int) -> None:
    whole, expected = stepped(folder, split, 0, train_step)
    done, found = stepped(folder, split, 0, lambda *given: pipelined_step(*given, parts))
    assert (done.weight, done.tokens) == (whole.weight, whole.tokens)
    assert done.loss == pytest.approx(whole.loss, rel=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_no_parts_at_all_are_refused(folder: Path, split: Split) -> None:
    with pytest.raises(RuntimeError):
        stepped(folder, split, 0, lambda *given: pipelined_step(*given, 0))
