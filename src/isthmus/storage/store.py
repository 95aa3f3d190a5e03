"""A store of bytes on disk: one file a number, the longest unused leaves first when there is a bound."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from pathlib import Path

from isthmus.storage.record import disk_errors, writing

NAME = re.compile(r"[0-9a-f]{16}")


class Store:
    """Bytes by 64-bit numbers. A file is there whole or not at all, and what is there outlasts the process.

    Args:
        folder: of the files; made when the first is written. One store at a time may use it.
        bound: bytes of all values together; None: as the disk bears.

    Raises:
        RunError: the folder cannot be read.
    """

    def __init__(self, folder: Path, bound: int | None = None) -> None:
        self._folder = folder
        self._bound = bound
        with disk_errors(folder):
            self._sizes = _sizes(folder)
        self.bytes = sum(self._sizes.values())
        """Of all values."""

    def __contains__(self, number: int) -> bool:
        return number in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def fits(self, size: int) -> bool:
        """Whether a value of so many bytes has room in the store when all others leave."""
        return self._bound is None or size <= self._bound

    def read(self, number: int) -> bytes | None:
        """The value, now the one last used; None if it is not here (any more)."""
        if number not in self._sizes:
            return None
        path = self._path(number)
        try:
            value = path.read_bytes()
            os.utime(path)  # the order of use outlasts the process, too
        except OSError:  # the disk lost it, or someone took it away
            self._forget(number)
            return None
        self._sizes.move_to_end(number)
        return value

    def write(self, number: int, value: bytes) -> None:
        """Put a value, in the place of an older one of this number. It must fit (see ``fits``).

        Raises:
            DiskFullError: there is no room on the disk; nothing is half there.
            RunError: the folder cannot be written for another reason.
        """
        assert self.fits(len(value))
        if number in self._sizes:
            self._remove(number)
        while not self.fits(self.bytes + len(value)):
            self._remove(next(iter(self._sizes)))
        with writing(self._path(number)) as temporary:
            temporary.write_bytes(value)
        self._sizes[number] = len(value)
        self.bytes += len(value)

    def _remove(self, number: int) -> None:
        path = self._path(number)
        with disk_errors(path):
            path.unlink(missing_ok=True)
        self._forget(number)

    def _forget(self, number: int) -> None:
        self.bytes -= self._sizes.pop(number)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:016x}"


def _sizes(folder: Path) -> OrderedDict[int, int]:
    """Size of each value, the longest unused first. What a crash left half written is removed."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if NAME.fullmatch(path.name):
            told = path.stat()
            found.append((told.st_mtime_ns, int(path.name, 16), told.st_size))
        elif NAME.fullmatch(path.name.removeprefix(".").removesuffix(".part")):
            path.unlink(missing_ok=True)
    return OrderedDict((number, size) for _, number, size in sorted(found))
