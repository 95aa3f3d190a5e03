"""Readers: what they learn of a token from its vector, and from how often it occurs alone."""

from __future__ import annotations

import random

import pytest
import torch

from isthmus.silo.defence.reader import NEGATIVES, Question, Reader

WORDS, WIDTH = 20, 6


def table() -> torch.Tensor:
    return torch.randn(WORDS, 8, generator=torch.Generator().manual_seed(0))


def question(*tokens: int) -> Question:
    return Question.of(list(range(len(tokens))), list(tokens), WORDS, random.Random(0))


def test_a_question_has_the_right_tokens_among_others_once_each() -> None:
    targets = question(3, 3, 7)
    candidates = targets.candidates_K.tolist()
    assert {3, 7} <= set(candidates)
    assert candidates == sorted(set(candidates))
    assert len(candidates) <= NEGATIVES + 2
    assert targets.positions_N.tolist() == [0, 1, 2]


def test_at_first_it_knows_nothing_and_then_what_occurs() -> None:
    torch.manual_seed(0)
    reader, targets = Reader(WIDTH, table()), question(3, 3, 7)
    z_TW = torch.randn(3, WIDTH)
    torch.testing.assert_close(reader.loss(z_TW, targets), torch.tensor(float(len(targets.candidates_K))).log())
    for _ in range(50):
        reader.count(targets)
    assert reader.frequency_loss(targets) < 0.7
    torch.testing.assert_close(reader.loss(z_TW, targets), reader.frequency_loss(targets))


def test_it_learns_the_token_of_a_vector_and_the_table_stays() -> None:
    torch.manual_seed(0)
    reader, targets = Reader(WIDTH, table()), question(3, 5, 7)
    z_TW = torch.eye(3, WIDTH)
    optimizer = torch.optim.Adam(reader.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        reader.loss(z_TW, targets).backward()
        optimizer.step()
    assert reader.loss(z_TW, targets) < 0.1 < reader.frequency_loss(targets)
    assert not any(one.shape == (WORDS, 8) for one in reader.state_dict().values())


def test_a_token_that_is_not_among_the_candidates_is_refused() -> None:
    with pytest.raises(IndexError):
        Reader(WIDTH, table()).count(Question(torch.tensor([0]), torch.tensor([WORDS]), torch.tensor([1])))
