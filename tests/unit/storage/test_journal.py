"""Journals survive a crash: whole lines are read, half ones are dropped, damaged ones are named."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from isthmus.errors import DiskFullError
from isthmus.storage.journal import Journal, read_journal
from tests.unit.storage.disk import full

LINE = f'{{"n": 1, "crc": "{zlib.crc32(b"""{"n": 1}"""):08x}"}}\n'
"""A line of a journal."""


def test_a_journal_keeps_lines_and_continues(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    for number in range(2):
        journal = Journal(path)
        journal.append({"n": number})
        assert read_journal(path)[-1] == {"n": number}
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("half", ['{"n": 2', "{", '{"n": 2, "crc": "98e3be97"}', "\x00" * 40])
@pytest.mark.parametrize("before", ["", LINE])
def test_a_half_last_line_is_not_read_and_dropped_on_opening(tmp_path: Path, half: str, before: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(before + half)
    whole = [{"n": 1}] if before else []
    assert read_journal(path) == whole
    journal = Journal(path)
    assert path.read_text() == before
    journal.append({"n": 3})
    assert read_journal(path) == [*whole, {"n": 3}]


def test_a_journal_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "absent.jsonl") == []


def test_a_journal_on_a_full_disk(tmp_path: Path) -> None:
    journal = Journal(full(tmp_path / "metrics.jsonl"))
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl") as caught:
        journal.append({"n": 1})
    assert caught.value.remedy
