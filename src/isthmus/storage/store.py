"""A store of byte strings on disk, one file each; least recently used ones are evicted if it is bounded."""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from pathlib import Path

from isthmus.storage.files import disk_errors, writing
from isthmus.storage.sealed import SEAL_BYTES, DamagedError, seal, unseal

log = logging.getLogger(__name__)

FILE_NAME = re.compile(r"[0-9a-f]{16}")


class Store:
    """Byte strings by 64-bit number. Files are written atomically, with a checksum, and remain after the process ends.

    Args:
        folder: the folder of the files, created with the first. Only one store may use it at a time.
        bound: largest total size of all values in bytes; None: no limit but the disk's.

    Raises:
        RunError: the folder cannot be read.
    """

    def __init__(self, folder: Path, bound: int | None = None) -> None:
        self._folder = folder
        self._bound = bound
        with disk_errors(folder):
            self._sizes = _sizes(folder)
        self.bytes = sum(self._sizes.values())
        """Total size of all values."""

    def __contains__(self, number: int) -> bool:
        return number in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def fits(self, size: int) -> bool:
        """Whether a value of this many bytes fits into the store if all others are evicted."""
        return self._bound is None or size <= self._bound

    def read(self, number: int) -> bytes | None:
        """The value, which becomes the most recently used; None if it is not in the store.

        A damaged file is removed, and that is logged.
        """
        if number not in self._sizes:
            return None
        path = self._path(number)
        try:
            value = bytes(unseal(path.read_bytes()))
            os.utime(path)  # the order of use remains after the process ends
        except OSError:  # the file was lost or removed
            self._forget(number)
            return None
        except DamagedError as error:
            log.warning("%s is removed: %s", path, error)
            self._remove(number)
            return None
        self._sizes.move_to_end(number)
        return value

    def write(self, number: int, value: bytes) -> None:
        """Write a value atomically, replacing an older one with this number. It must fit (see ``fits``).

        Raises:
            DiskFullError: the disk is full.
            RunError: the folder cannot be written for another reason.
        """
        assert self.fits(len(value))
        if number in self._sizes:
            self._remove(number)
        while not self.fits(self.bytes + len(value)):
            self._remove(next(iter(self._sizes)))
        with writing(self._path(number)) as temporary:
            temporary.write_bytes(seal(value))
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
    """Size of each value, least recently used first. Removes incomplete files left by a crash."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if FILE_NAME.fullmatch(path.name):
            stat = path.stat()
            found.append((stat.st_mtime_ns, int(path.name, 16), max(0, stat.st_size - SEAL_BYTES)))
        elif FILE_NAME.fullmatch(path.name.removeprefix(".").removesuffix(".part")):
            path.unlink(missing_ok=True)
    return OrderedDict((number, size) for _, number, size in sorted(found))
