"""Answers as differences: both sides keep the same, any lost copy costs bytes alone, and no made-up base is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import FrameError
from isthmus.model.answers import NONE, KeptAnswers, decode_answers, digest, encode_answers
from isthmus.wire import isthmus_pb2 as pb

WIDTH, CODEC = 96, "range-0.5"


def drawn(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    known=st.lists(st.booleans(), min_size=6, max_size=6),
    seed=st.integers(0, 2**20),
)
def test_each_sequence_comes_back_in_its_place(lengths: list[int], known: list[bool], seed: int) -> None:
    rows = [drawn(length, seed + number) for number, length in enumerate(lengths)]
    bases = [(row + 0.05).bfloat16() if has else None for row, has in zip(rows, known, strict=False)]
    answer = encode_answers(torch.cat(rows), lengths, bases, CODEC)
    found = decode_answers(pb.Hidden.FromString(answer.SerializeToString()), lengths, bases, CODEC, WIDTH)
    assert list(answer.changed) == [number for number, base in enumerate(bases) if base is not None]
    for row, back in zip(rows, found, strict=True):
        assert back.shape == row.shape
        assert (back - row).abs().max() < 1.0


def test_what_changed_little_costs_little() -> None:
    rows = drawn(50, 0)
    whole = encode_answers(rows, [50], [None], CODEC)
    again = encode_answers(rows + 0.05 * drawn(50, 1), [50], [rows.bfloat16()], CODEC)
    assert again.ByteSize() < 0.15 * whole.ByteSize()


@pytest.mark.parametrize("changed", [[0], [2], [1, 2**31]])
def test_a_change_of_what_was_not_named_is_refused(changed: list[int]) -> None:
    base = drawn(3, 0).bfloat16()
    answer = encode_answers(drawn(6, 1), [3, 3], [None, base], CODEC)
    answer.changed[:] = changed
    with pytest.raises(FrameError, match="a change of an answer that was not named"):
        decode_answers(answer, [3, 3], [None, base], CODEC, WIDTH)


@pytest.mark.parametrize("field", ["hidden", "changes"])
def test_a_part_that_is_missing_is_refused(field: str) -> None:
    bases = [None, drawn(3, 0).bfloat16()]
    answer = encode_answers(drawn(6, 1), [3, 3], bases, CODEC)
    answer.ClearField(field)  # type: ignore[arg-type]
    with pytest.raises(FrameError):
        decode_answers(answer, [3, 3], bases, CODEC, WIDTH)


def test_kept_answers_come_back_over_restarts_and_of_their_length_alone(tmp_path: Path) -> None:
    answer = drawn(4, 0)
    KeptAnswers(tmp_path, WIDTH).write(7, answer)
    kept = KeptAnswers(tmp_path, WIDTH)
    found = kept.read(7, 4)
    assert found is not None
    assert torch.equal(found, answer.bfloat16())
    assert kept.read(7, 5) is None
    assert kept.read(8, 4) is None
    kept.write(7, drawn(5, 1))
    assert kept.read(7, 4) is None


def test_the_oldest_make_room_and_what_never_fits_is_not_kept(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path, WIDTH, bound=2 * 4 * 2 * WIDTH)
    for number in range(3):
        kept.write(number, drawn(4, number))
    kept.write(9, drawn(40, 9))
    assert [kept.read(number, 4) is not None for number in range(3)] == [False, True, True]
    assert kept.read(9, 40) is None


def test_digests_tell_answers_apart() -> None:
    one = drawn(4, 0).bfloat16()
    other = one.clone()
    other[3, -1] += 1
    assert digest(None) == NONE
    assert len({NONE, digest(one), digest(other)}) == 3
    assert digest(one) == digest(one.clone())
