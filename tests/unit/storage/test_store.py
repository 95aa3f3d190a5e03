"""The store: bytes by number that outlast the process, bounded, the longest unused first to leave."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import DiskFullError, RunError
from isthmus.storage.sealed import SEAL_BYTES
from isthmus.storage.store import Store

LARGEST = 2**64 - 1


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size - SEAL_BYTES for path in folder.iterdir()}


def test_values_come_back_and_outlast_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "er")
    values = {0: b"", 7: b"seven", LARGEST: bytes(3000)}
    for number, value in values.items():
        store.write(number, value)
    for one in (store, Store(tmp_path / "deep" / "er")):
        assert {number: one.read(number) for number in values} == values
        assert (len(one), one.bytes) == (3, 3005)
        assert 7 in one
        assert 8 not in one
        assert one.read(8) is None


def test_a_value_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    store = Store(tmp_path, 10)
    store.write(1, b"123456789")
    store.write(1, b"abcd")
    store.write(2, b"efghij")
    assert (store.read(1), store.read(2), store.bytes) == (b"abcd", b"efghij", 10)


def test_the_longest_unused_leaves_first(tmp_path: Path) -> None:
    store = Store(tmp_path, 3)
    for number in (1, 2, 3):
        store.write(number, b"x")
    store.read(1)
    store.write(4, b"xx")
    assert [number for number in range(5) if number in store] == [1, 4]
    assert files(tmp_path) == {f"{1:016x}": 1, f"{4:016x}": 2}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 6)), max_size=40), st.integers(0, 40))
def test_the_bound_holds_and_the_order_of_use_outlasts_the_store(
    tmp_path_factory: pytest.TempPathFactory, uses: list[tuple[bool, int, int]], restart: int
) -> None:
    """Against an ordered dictionary, with a new store on the same folder at some moment."""
    folder = tmp_path_factory.mktemp("store")
    store, model = Store(folder, 12), OrderedDict[int, bytes]()
    for moment, (writes, number, size) in enumerate(uses):
        if moment == restart:
            for age, one in enumerate(model):  # a disk may tell times only coarsely; the order must not hang on that
                os.utime(folder / f"{one:016x}", ns=(age * 10**9, age * 10**9))
            store = Store(folder, 12)
        if writes:
            store.write(number, bytes(size))
            model.pop(number, None)
            model[number] = bytes(size)
            while sum(map(len, model.values())) > 12:
                model.popitem(last=False)
        else:
            assert store.read(number) == model.get(number)
            if number in model:
                model.move_to_end(number)
        assert {one for one in range(6) if one in store} == set(model)
        assert store.bytes == sum(files(folder).values()) == sum(map(len, model.values())) <= 12


def test_reading_is_use_that_outlasts_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path, 2)
    for number in (1, 2):
        store.write(number, b"x")
        os.utime(tmp_path / f"{number:016x}", (number, number))
    store.read(1)
    Store(tmp_path, 2).write(3, b"x")
    assert set(files(tmp_path)) == {f"{1:016x}", f"{3:016x}"}


def test_fits(tmp_path: Path) -> None:
    assert Store(tmp_path).fits(10**15)
    assert Store(tmp_path, 5).fits(5)
    assert not Store(tmp_path, 5).fits(6)


def test_what_the_disk_lost_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path, 10)
    store.write(1, b"abc")
    (tmp_path / f"{1:016x}").unlink()
    assert store.read(1) is None
    assert (1 in store, store.bytes) == (False, 0)


def test_what_a_crash_left_half_written_is_removed_and_other_files_stay(tmp_path: Path) -> None:
    for name in (f".{5:016x}.part", "secret", ".secret.part"):
        (tmp_path / name).write_bytes(b"half")
    assert len(Store(tmp_path)) == 0
    assert set(files(tmp_path)) == {"secret", ".secret.part"}


def test_a_full_disk_is_named_and_leaves_nothing_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write(1, b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError):
            store.write(2, b"after")
    assert files(tmp_path) == {f"{1:016x}": 6}
    assert (2 in store, store.bytes) == (False, 6)
    store.write(2, b"after")
    assert store.read(2) == b"after"


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError):
        Store(tmp_path / "file" / "in").write(1, b"x")
