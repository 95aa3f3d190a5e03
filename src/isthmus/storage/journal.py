"""Journals: append-only files of JSON lines, each with a checksum, that survive a crash."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from isthmus.errors import RunError
from isthmus.storage.files import PRIVATE, disk_errors, private_folder

LONGEST_LINE = 2**20
"""Largest number of bytes of a journal's line."""
_CHECK = '"crc": "'
"""Start of the last entry of a journal's line, its checksum."""


class Journal:
    """An append-only JSONL file. Opening it removes an incomplete last line, left by a crash or a full disk.

    The last key of a line, ``crc``, is the CRC-32 of the line's JSON without it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk_errors(path):
            private_folder(path.parent)
            if not path.exists():
                path.touch(mode=PRIVATE)
            _drop_incomplete_line(path)

    def append(self, values: dict[str, Any]) -> None:
        """Append one line, unbuffered.

        Raises:
            DiskFullError: the disk is full.
        """
        text = json.dumps(values)
        line = memoryview(f'{text[:-1]}, {_CHECK}{zlib.crc32(text.encode()):08x}"}}\n'.encode())
        with disk_errors(self._path), self._path.open("ab", buffering=0) as file:
            while line:
                line = line[file.write(line) :]


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; none if the file does not exist.

    Raises:
        RunError: a line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_journal_line(path, number, line) for number, line in enumerate(lines, 1)]


def _journal_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    start, _, check = line.rpartition(f", {_CHECK}".encode())
    text = start + b"}"
    if check != f'{zlib.crc32(text):08x}"}}'.encode():
        raise RunError(
            f"line {number} of {path} is damaged", remedy="restore the file from a backup, or delete the line"
        )
    values: dict[str, Any] = json.loads(text)
    return values


def _drop_incomplete_line(path: Path) -> None:
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:  # new, or a device, which may be endless
            return
        start = max(0, size - LONGEST_LINE)
        file.seek(start)
        tail = file.read()
        end = start + tail.rfind(b"\n") + 1
        if end < size:
            file.truncate(end)
