"""Files are written whole, or the old ones stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.storage.files import writing


def test_writing_takes_the_place_only_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with pytest.raises(UnicodeEncodeError), writing(path) as temporary:
        temporary.write_text("half\ud800", encoding="utf-8")
    assert list(path.parent.iterdir()) == []
    with writing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
