"""Freed memory leaves the process."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from isthmus.engines.memory import return_memory

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
