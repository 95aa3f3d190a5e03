"""Digests: every byte counts, files are read once, and a change of size or time is never overlooked."""

from __future__ import annotations

import json
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.errors import ModelError
from isthmus.model import digests
from isthmus.model.digests import METADATA, digests_of, header_of, state_of
from isthmus.storage.sealed import seal, unseal

LONG_AGO = 1_000_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no digests in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_known", {})
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(7, 5) for name in ("a", "b.weight", "c")}, path, metadata={"format": "pt"})
    return path


def settle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file be old enough for the cache."""
    monkeypatch.setattr(digests, "SETTLED", -3600.0)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files hashed so far."""
    seen: list[Path] = []
    original = digests._hashed

    def note(path: Path) -> dict[str, str]:
        seen.append(path)
        return original(path)

    monkeypatch.setattr(digests, "_hashed", note)
    return seen


def test_each_tensor_and_the_metadata_has_its_own(file: Path) -> None:
    before = digests_of(file)
    assert before.keys() == {"a", "b.weight", "c", METADATA}
    tensors = load_file(file)
    tensors["c"][6, 4] += 1e-6
    save_file(tensors, file, metadata={"format": "pt"})
    after = digests_of(file)
    assert {name for name in before if before[name] != after[name]} == {"c"}
    save_file(tensors, file)
    assert digests_of(file) == after
    save_file(tensors, file, metadata={"format": "pt", "of": "another"})
    assert digests_of(file)[METADATA] != after[METADATA]
    save_file(tensors | {"a": tensors["a"].reshape(5, 7), "b.weight": tensors["b.weight"].view(torch.int32)}, file)
    changed = digests_of(file)
    assert {name for name in after if changed[name] != after[name]} == {"a", "b.weight"}


def test_every_byte_of_a_file_counts(file: Path) -> None:
    content, before, rng = file.read_bytes(), digests_of(file), random.Random(0)
    for place in range(len(content)):
        other = rng.choice([byte for byte in range(256) if byte != content[place]])
        file.write_bytes(content[:place] + bytes([other]) + content[place + 1 :])
        with suppress(ModelError):
            assert digests_of(file) != before, place


@pytest.mark.parametrize("space", ["\t", "\n", " \n", "x"])
def test_the_headers_padding_counts(file: Path, space: str) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip(b" ") + space.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(ModelError, match="cannot read"):
        digests_of(file)


def test_a_file_is_read_once_in_a_process_and_not_again_in_the_next(
    file: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(file, monkeypatch)
    first = digests_of(file)
    assert digests_of(file) == first
    assert len(hashed) == 1
    digests._known.clear()  # as in another process
    assert digests_of(file) == first
    assert len(hashed) == 1


def test_a_change_of_content_is_noticed_in_memory_and_on_disk(
    file: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(file, monkeypatch)
    first, content = digests_of(file), file.read_bytes()
    for keep_memory in (True, False):
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(file, (LONG_AGO, LONG_AGO))  # an old time is another time
        if not keep_memory:
            digests._known.clear()
        assert digests_of(file) != first
        file.write_bytes(content)
        assert digests_of(file) == first


def test_a_file_written_just_now_is_not_cached(file: Path, hashed: list[Path], cache: Path) -> None:
    for _ in range(2):
        digests_of(file)
    assert len(hashed) == 2
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = digests._hashed

    def meddle(path: Path) -> dict[str, str]:
        found = original(path)
        path.write_bytes(path.read_bytes() + b"x")
        return found

    monkeypatch.setattr(digests, "_hashed", meddle)
    with pytest.raises(ModelError, match="was changed while it was read"):
        digests_of(file)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"place": 1, "state": 2, "digests": 3}', "\x00"])
def test_a_damaged_cache_is_not_believed(
    file: Path, cache: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    settle(file, monkeypatch)
    first = digests_of(file)
    [kept] = cache.rglob("*.json")
    kept.write_bytes(content.encode() if content == "{" else seal(content.encode()))
    digests._known.clear()
    assert digests_of(file) == first
    assert len(hashed) == 2
    assert json.loads(bytes(unseal(kept.read_bytes())))["digests"] == first


@pytest.mark.parametrize(
    "environment",
    [
        {"XDG_CACHE_HOME": "", "HOME": ""},
        {"XDG_CACHE_HOME": "relative", "HOME": "relative"},
        {"XDG_CACHE_HOME": "/proc/no/such"},
    ],
    ids=str,
)
def test_without_a_cache_folder_files_are_hashed(
    file: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    settle(file, monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    first = digests_of(file)
    digests._known.clear()
    assert digests_of(file) == first
    assert len(hashed) == 2


def test_the_cache_is_in_the_home_folder_by_default(file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    settle(file, monkeypatch)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    digests_of(file)
    assert len(list((tmp_path / "home" / ".cache" / "isthmus" / "digests").iterdir())) == 1


def test_headers_and_states_of_what_is_no_file(tmp_path: Path) -> None:
    missing, pointer = tmp_path / "none", tmp_path / "pointer"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match=r"cannot read .*none"):
        state_of(missing)
    with pytest.raises(ModelError, match=r"cannot read .*none"):
        header_of(missing)
    with pytest.raises(ModelError, match="git lfs pull"):
        header_of(pointer)
