"""Public text of an adversary: a file's lines, or rows sampled from the public model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.audit.public_text import read_lines, sample_public_text
from isthmus.errors import AttackError


def test_lines_that_say_something_are_read(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("one\n\n  \ntwo\u2028half\n")
    assert read_lines(tmp_path / "text") == ["one", "two\u2028half"]


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xff\xfe", None])
def test_no_text_is_refused(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    with pytest.raises(AttackError) as caught:
        read_lines(tmp_path / "text")
    assert "--public" in caught.value.remedy


def test_sampled_rows_follow_from_the_seed_alone(attacked_model: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rows = sample_public_text(attacked_model, 1, 3, length=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(row) for row in rows] == [5] * 3
    assert rows == sample_public_text(attacked_model, 1, 3, length=4)
    assert rows != sample_public_text(attacked_model, 2, 3, length=4)
