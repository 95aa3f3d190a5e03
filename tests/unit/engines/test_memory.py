"""Freed memory leaves the process; its peak and what is free are known."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from isthmus.engines import memory
from isthmus.engines.memory import free_memory, peak_memory, return_memory

BLOCK, BLOCKS = 100_000, 1000
"""Blocks that the C library does not map one by one, and would keep."""


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def test_what_was_freed_between_blocks_in_use_is_returned() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pytest.skip("this C library returns memory by itself")
    blocks = [b"x" * BLOCK for _ in range(BLOCKS)]
    full = resident()
    kept = blocks[::10]
    del blocks
    return_memory()
    assert resident() < full - 0.8 * BLOCK * BLOCKS
    assert len(kept) == BLOCKS // 10


def test_the_peak_covers_what_was_freed_again() -> None:
    block = b"x" * (64 * 2**20)
    most = peak_memory()
    del block
    assert most >= 64 * 2**20
    assert peak_memory() >= most


def test_free_memory_is_some_of_the_machines() -> None:
    assert 0 < free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_control_group_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = free_memory()
    (tmp_path / "memory.max").write_text("1000000\n")
    assert free_memory() == 400_000 < unlimited
    (tmp_path / "memory.current").write_text("1600000\n")
    assert free_memory() == 0
