"""Training steps and measures of one silo, on a model small enough to reckon by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isthmus.data.tokens import Tokens, collate
from isthmus.silo.trainer import evaluate, train_step

WORDS = 8


class Bigrams(torch.nn.Module):
    """Scores of the next token follow from this one alone."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(WORDS, WORDS))

    def forward(
        self,
        input_ids: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> Any:
        logits = self.table[input_ids][:, -logits_to_keep:]
        if shift_labels is None:
            return SimpleNamespace(logits=logits)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def data(rows: list[Tokens], choices: list[tuple[int, ...]] | None = None) -> Any:
    return SimpleNamespace(held_out=rows, choices_of=lambda row: row.choices or choices or [], pad=0)


def test_a_step_moves_along_the_mean_loss_and_counts_its_tokens() -> None:
    model: Any = Bigrams()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = collate([Tokens([1, 2], [3]), Tokens([4], [5, 6])], 0)
    step = train_step(model, optimizer, batch)
    assert (step.loss, step.weight, step.skipped) == (pytest.approx(math.log(WORDS)), 3, 0)
    assert step.tokens == batch.tokens
    assert model.table[2, 3] > 0 > model.table[2, 4]
    assert not model.table[1].any(), "a prompt's own tokens are not learned"


def test_free_text_is_measured_by_its_loss() -> None:
    model: Any = Bigrams()
    scores = evaluate(model, data([Tokens([1], [2]), Tokens([3], [4, 5])]))
    assert scores["loss"] == pytest.approx(math.log(WORDS))
    assert scores["perplexity"] == pytest.approx(WORDS)


@pytest.mark.parametrize("choices", [[(3,), (4,)], [(3, 5), (4, 5)]], ids=["one token", "several"])
def test_choices_are_measured_by_accuracy(choices: list[tuple[int, ...]]) -> None:
    model: Any = Bigrams()
    with torch.no_grad():
        model.table[1, 3] = model.table[2, 4] = 1.0
    rows = [Tokens([prompt], list(choices[right])) for prompt, right in ((1, 0), (2, 1), (1, 1), (2, 1))]
    assert evaluate(model, data(rows, choices)) == {"accuracy": 0.75}
    assert evaluate(model, data(rows, choices), rows[:2]) == {"accuracy": 1.0}


def test_rows_may_have_choices_of_their_own() -> None:
    model: Any = Bigrams()
    with torch.no_grad():
        model.table[1, 3] = model.table[2, 4] = 1.0
    short = [Tokens([1], [3], choices=((3,), (5,))), Tokens([2], [5], choices=((4,), (5,), (6,)))]
    assert evaluate(model, data(short)) == {"accuracy": 0.5}
    long = [Tokens([1], [3, 1], choices=((3, 1), (5, 6))), Tokens([2], [4], choices=((5, 6), (4,), (6, 7)))]
    assert evaluate(model, data(short + long), size=2) == {"accuracy": 0.75}


def test_any_of_several_right_choices_counts() -> None:
    model: Any = Bigrams()
    with torch.no_grad():
        model.table[1, 4] = 1.0
    choices = ((3,), (4,), (5,))
    rows = [Tokens([1], [3], choices=choices, right=((3,), (4,))), Tokens([1], [3], choices=choices)]
    assert evaluate(model, data(rows)) == {"accuracy": 0.5}
    assert evaluate(model, data(rows[:1])) == {"accuracy": 1.0}


def test_no_rows_cannot_be_measured() -> None:
    model: Any = Bigrams()
    with pytest.raises((ZeroDivisionError, ValueError)):
        evaluate(model, data([]))
