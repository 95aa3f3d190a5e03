"""Files that are written whole or not at all, for their owner alone; a full disk is said by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus.errors import DiskFullError, RunError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PRIVATE = 0o600
"""Mode of the files: hidden states, adapters and journals are for the party that wrote them."""


def private_folder(path: Path) -> None:
    """Create this folder and those above it that do not exist, for their owner alone."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(exist_ok=True)  # a file of that name is an error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path that replaces ``path`` atomically when the ``with`` block ends without an error. The file and
    the folders that are created for it are for their owner alone.

    Raises:
        DiskFullError, RunError: see ``disk_errors``.
    """
    temporary = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        private_folder(path.parent)
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT, PRIVATE))
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert ``OSError`` within the ``with`` block, which writes ``path``, to errors with a remedy.

    Raises:
        DiskFullError: the disk is full.
        RunError: any other ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise _full(path) from error
        raise RunError(
            f"cannot write {path}: {error.strerror}", remedy="name a place that this user may write to"
        ) from error


def _full(path: Path) -> DiskFullError:
    return DiskFullError(
        f"the disk is full; cannot write {path}",
        remedy="free some space, then continue with 'isthmus run --resume'",
    )
