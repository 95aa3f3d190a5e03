"""A silo's secrets: made once, for nobody else to read; and its ledger, which is of one recipe and begun once."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.errors import IsthmusError, LedgerError
from isthmus.recipe import Recipe
from isthmus.silo.secrets import open_ledger, read_secret
from isthmus.storage.record import RoleDirectory
from tests.conftest import make_recipe


def recipe(noise: float = 0.0) -> Recipe:
    return make_recipe(Path("none"), boundary={"forward": {"noise": noise}})


def test_a_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "secret"
    path.parent.mkdir()
    first = read_secret(path)
    assert len(first) == 32
    assert read_secret(path) == first
    assert path.stat().st_mode & 0o077 == 0
    assert read_secret(tmp_path / "other") != first


def test_a_secret_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IsthmusError) as caught:
        read_secret(tmp_path / "file" / "secret")
    assert caught.value.remedy


def test_a_ledger_is_of_one_silo_and_notes_another_recipe(tmp_path: Path) -> None:
    directory, path = RoleDirectory(tmp_path), tmp_path / "ledger.jsonl"
    lines = []
    for noise in (0.0, 0.0, 0.5):
        open_ledger(directory, recipe(noise), "a").close()
        lines.append(len(path.read_text().splitlines()))
    assert lines == [1, 1, 2]
    with pytest.raises(LedgerError, match="not of 'b'"):
        open_ledger(directory, recipe(), "b")


def test_a_silo_that_trained_without_a_ledger_lost_it(tmp_path: Path) -> None:
    directory = RoleDirectory(tmp_path)
    directory.journal("metrics").append({"event": "step", "tokens": 5})
    with pytest.raises(LedgerError):
        open_ledger(directory, recipe(), "a")
