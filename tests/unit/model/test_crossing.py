"""Which positions cross: held against a loop over rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.model.crossing import IGNORED, crossing_positions, up_to_last_crossing


@st.composite
def padded_rows(draw: st.DrawFn) -> tuple[torch.Tensor, list[tuple[int, int]], bool]:
    """A mask ``[B, L]``, each row's prompt and answer lengths, and whether padding is on the left."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=4))
    longest, left = max(map(sum, lengths)), draw(st.booleans())
    real_BL = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, size in enumerate(map(sum, lengths)):
        real_BL[row, longest - size if left else 0 : longest if left else size] = True
    return real_BL, lengths, left


def expected(real_BL: torch.Tensor, lengths: list[tuple[int, int]], tail: int) -> list[list[int]]:
    """Of each row, the places among its tokens that cross."""
    return [list(range(max(0, prompt - tail), prompt + answer)) for prompt, answer in lengths]


def found(real_BL: torch.Tensor, crosses_BL: torch.Tensor) -> list[list[int]]:
    assert not (crosses_BL & ~real_BL).any()
    return [
        crosses_L[real_L].nonzero().flatten().tolist() for real_L, crosses_L in zip(real_BL, crosses_BL, strict=True)
    ]


@settings(derandomize=True, deadline=None)
@given(padded_rows(), st.integers(1, 8))
def test_a_tail_of_the_prompt_and_the_whole_answer_cross(
    rows: tuple[torch.Tensor, list[tuple[int, int]], bool], tail: int
) -> None:
    real_BL, lengths, _ = rows
    ids_BL = torch.arange(real_BL.numel()).view(real_BL.shape)
    place_BL = real_BL.cumsum(dim=1)
    prompts = torch.tensor([prompt for prompt, _ in lengths]).unsqueeze(1)
    labels_BL = torch.where(real_BL & (place_BL > prompts), ids_BL, IGNORED)
    assert found(real_BL, crossing_positions(real_BL, tail, labels_BL)) == expected(real_BL, lengths, tail)


@settings(derandomize=True, deadline=None)
@given(padded_rows(), st.integers(1, 8))
def test_targets_end_the_prompt_where_the_first_is_predicted(
    rows: tuple[torch.Tensor, list[tuple[int, int]], bool], tail: int
) -> None:
    real_BL, lengths, _ = rows
    place_BL = real_BL.cumsum(dim=1)
    prompts = torch.tensor([prompt for prompt, _ in lengths]).unsqueeze(1)
    targets_BL = torch.where(real_BL & (place_BL >= prompts), 7, IGNORED)
    assert found(real_BL, crossing_positions(real_BL, tail, None, targets_BL)) == expected(real_BL, lengths, tail)
    assert found(real_BL, crossing_positions(real_BL, tail)) == [
        list(range(max(0, prompt + answer - tail), prompt + answer)) for prompt, answer in lengths
    ]


@settings(derandomize=True, deadline=None)
@given(padded_rows())
def test_without_a_tail_all_tokens_cross(rows: tuple[torch.Tensor, list[tuple[int, int]], bool]) -> None:
    real_BL, _, _ = rows
    assert torch.equal(crossing_positions(real_BL, None), real_BL)
    assert torch.equal(up_to_last_crossing(real_BL, real_BL), real_BL)


def test_drafts_behind_the_prompt_cross_too() -> None:
    real_BL = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert found(real_BL, crossing_positions(real_BL, 2, scored=3)) == [[1, 2, 3, 4], [2, 3, 4, 5]]


def test_what_stays_behind_the_last_crossing_position_is_not_told() -> None:
    real_BL = torch.tensor([[0, 1, 1, 1]], dtype=torch.bool)
    crosses_BL = torch.tensor([[0, 0, 1, 0]], dtype=torch.bool)
    assert up_to_last_crossing(real_BL, crosses_BL).tolist() == [[False, True, True, False]]
