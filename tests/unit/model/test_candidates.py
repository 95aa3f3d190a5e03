"""Drafts go as far as plain decoding's cache does, and the cache is told of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isthmus.model.candidates import BoundedCandidates, CandidatesByLength

DRAFTS, CONTEXT = 6, 20


class Always:
    """Drafts so many tokens."""

    requires_model_outputs = False

    def __init__(self) -> None:
        self.matches: list[int] = []

    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([input_ids, torch.ones(1, DRAFTS, dtype=torch.long)], dim=1), torch.zeros(1, DRAFTS, 3)

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: Any, num_matches: int) -> None:
        self.matches.append(num_matches)


@pytest.mark.parametrize(
    ("past", "length", "switch", "padding", "expected"),
    [
        (0, 5, None, 0, 0),  # none in a prompt's own step
        (4, 5, None, 0, DRAFTS),
        (8, 9, 12, 0, 3),
        (11, 12, 12, 0, 0),
        (8, 9, 12, 2, 5),
        (12, 13, 12, 0, DRAFTS),  # the text itself is beyond
        (3, 4, 12, 0, DRAFTS),
        (16, 17, 12, 0, 3),  # the context ends
        (16, 17, None, 1, 4),
    ],
)
def test_drafts_stay_on_one_side_of_the_switch(
    past: int, length: int, switch: int | None, padding: int, expected: int
) -> None:
    cache: Any = SimpleNamespace(drafted=None, get_seq_length=lambda: past)
    inner: Any = Always()
    bounded = CandidatesByLength(inner, CONTEXT, padding, cache, switch)
    ids, logits = bounded.get_candidates(torch.zeros(1, length, dtype=torch.long))
    assert ids.shape == (1, length + expected)
    assert (0 if logits is None else logits.shape[1]) == expected
    assert cache.drafted == (expected > 0)
    bounded.update_candidate_strategy(ids, None, 2)
    assert inner.matches == [2]


@pytest.mark.parametrize(
    ("length", "padding", "expected"), [(5, 0, DRAFTS), (17, 0, 3), (17, 2, 5), (20, 0, 0), (21, 0, 0)]
)
def test_drafts_stay_within_the_context(length: int, padding: int, expected: int) -> None:
    inner: Any = Always()
    ids, _ = BoundedCandidates(inner, CONTEXT, padding).get_candidates(torch.zeros(1, length, dtype=torch.long))
    assert ids.shape == (1, length + expected)
