"""The ledger: every release of one silo, appended to a file before the tensor leaves, in a chain of hashes.

Each line holds the hash of the line before it; the first names the silo. A second file, the *head*, holds how many
lines there are and the hash of the last, so that a missing end is noticed, too. A line is on the disk (fdatasync)
before its frame leaves; the head is written after it, in place and within one sector, without waiting for the disk. So
after a crash the head may be behind the ledger, never before it: whole lines that the head does not know are accepted,
since more lines only mean more charges; half a line is dropped if the head does not know it, for then nothing left.
Only the first head is waited for, with the folder: after a loss of power both files are there.

Order is that of the chain. Times are told to people; no charge and no budget depends on them.

The chain shows what was lost or edited by accident or in part. Who can write both files can forge all of it; to be sure
against the silo's own operator, keep the head's hash elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from isthmus.errors import ClockError, LedgerError, LedgerTakenError
from isthmus.privacy.events import Release
from isthmus.storage.record import disk_errors

GENESIS = "0" * 64
SLACK = 1.0
"""Seconds by which clocks are set back without anybody's intent."""
HEAD_BYTES = 96
"""A head is always that long, so that it can be written over in place."""
RESTORE = "restore the ledger and its head from a copy, or start a new run; its charges cannot be known otherwise"


class Ledger(Protocol):
    def record(self, release: Release) -> None:
        """Note a release; if this raises, nothing leaves."""
        ...

    def history(self) -> Iterator[Release]:
        """All releases so far, the oldest first."""
        ...

    def close(self) -> None:
        """Let another hold it."""
        ...


class MemoryLedger:
    """A ledger that lasts as long as the process."""

    def __init__(self) -> None:
        self.releases: list[Release] = []

    def record(self, release: Release) -> None:
        self.releases.append(release)

    def history(self) -> Iterator[Release]:
        return iter(self.releases)

    def close(self) -> None: ...


@dataclass(frozen=True)
class Contents:
    """A ledger that was read and verified."""

    lines: list[dict[str, Any]]
    last: str
    """Hash of the last line."""
    size: int
    """Bytes of whole lines; anything beyond is half a line."""

    @property
    def time(self) -> float:
        return float(self.lines[-1]["time"]) if self.lines else 0.0

    def releases(self) -> Iterator[Release]:
        """Raises ``LedgerError`` at an event that this version does not know."""
        return (Release.from_dict(line["release"]) for line in self.lines if "release" in line)


class FileLedger:
    """A ledger in a file, held by one process at a time.

    Args:
        silo: whose it is.
        recipe: hash of what the recipe says on privacy. A change is noted, not refused: charges do not depend on it.
        begun: releases are known to have been made, so that an empty ledger has lost them.
        clock: seconds since the epoch.

    Raises:
        LedgerError: it was truncated or edited, or is another silo's.
        LedgerTakenError: another process has it open.
        ClockError: the clock is behind the last entry.
    """

    def __init__(
        self,
        path: Path,
        *,
        silo: str = "",
        recipe: str = "",
        begun: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self._process = os.getpid()
        self._clock = clock
        self._files: list[int] = []
        self._closing = weakref.finalize(self, _close, self._files)
        try:
            with disk_errors(path):
                contents = self._open()
            self._count, self._last, self._time = len(contents.lines), contents.last, contents.time
            self._begin(contents, silo, recipe, begun)
        except BaseException:
            self.close()
            raise

    def record(self, release: Release) -> None:
        """Note a release; it is on the disk when this returns.

        Raises:
            LedgerTakenError: this is a child of the process that has it open; both would write the same place.
            LedgerError: it is closed.
            DiskFullError: there is no room. The ledger is as it was.
        """
        if os.getpid() != self._process:
            raise LedgerTakenError(
                f"{self.path} is held by the process that opened it, not by its child",
                remedy="send from the process that joined; or join after the fork, with a run directory of its own",
            )
        if not self._files:
            raise LedgerError(f"{self.path} is closed", remedy="join again: a closed silo sends nothing")
        self._append({"release": release.to_dict()})

    def history(self) -> Iterator[Release]:
        return read_ledger(self.path).releases()

    def close(self) -> None:
        self._closing()

    def _open(self) -> Contents:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._files.append(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        try:
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LedgerTakenError(
                f"another process notes its releases in {self.path}",
                remedy="give each silo its own run directory, and wait for a run's end before using it",
            ) from None
        contents = read_ledger(self.path)
        if os.fstat(self._files[0]).st_size > contents.size:
            os.ftruncate(self._files[0], contents.size)
        self._files.append(os.open(head_of(self.path), os.O_RDWR | os.O_CREAT, 0o600))
        self._size = contents.size
        return contents

    def _begin(self, contents: Contents, silo: str, recipe: str, begun: bool) -> None:
        """Check whose ledger it is and that time goes on; write the first line, or that the recipe is another."""
        owner = contents.lines[0]["silo"] if contents.lines else silo
        if owner != silo:
            raise LedgerError(
                f"{self.path} is the ledger of silo {owner!r}, not of {silo!r}",
                remedy="give each silo its own run directory",
            )
        if begun and not any("release" in line for line in contents.lines):
            raise LedgerError(f"releases were made, but {self.path} holds none", remedy=RESTORE)
        if self._clock() < self._time - SLACK:
            raise ClockError(
                f"the clock is {self._time - self._clock():.0f} s behind the last entry of {self.path}",
                remedy="set the clock right; if it was ahead at that entry, wait, or start a new run",
            )
        recipes = [line["recipe"] for line in contents.lines if "recipe" in line]
        if not recipes:
            self._append({"silo": silo, "recipe": recipe, "version": 1})
            self._settle()
        elif recipes[-1] != recipe:
            self._append({"recipe": recipe})

    def _append(self, values: dict[str, Any]) -> None:
        now = math.floor(self._clock() * 1000) / 1000
        entry: dict[str, Any] = {"seq": self._count, "time": max(now, self._time), "prev": self._last}
        if now < self._time - SLACK:
            entry["behind"] = round(self._time - now, 3)  # the clock went backwards while we ran
        line = json.dumps(entry | values, allow_nan=False).encode()
        with disk_errors(self.path):
            self._write(line + b"\n")
            self._count, self._last, self._time = self._count + 1, _hash(line), entry["time"]
            os.pwrite(self._files[1], f"{self._count} {self._last}\n".ljust(HEAD_BYTES).encode(), 0)

    def _settle(self) -> None:
        """Onto the disk: the first head, and that both files exist."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            with disk_errors(self.path):
                os.fsync(self._files[1])
                os.fsync(folder)
        finally:
            os.close(folder)

    def _write(self, data: bytes) -> None:
        """Onto the disk, or (where it is full) not at all."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._files[0], rest) :]
            os.fdatasync(self._files[0])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._files[0], self._size)
            raise
        self._size += len(data)


def head_of(path: Path) -> Path:
    return path.with_suffix(".head")


def read_ledger(path: Path) -> Contents:
    """A ledger's whole lines, verified against one another and the head; of one that does not exist, none.

    It may be read while it is being written.

    Raises:
        LedgerError: something is missing, edited or out of order.
    """
    count, head = _read_head(head_of(path))
    data = path.read_bytes() if path.exists() and path.stat().st_size else b""
    whole = data[: data.rfind(b"\n") + 1]
    lines: list[dict[str, Any]] = []
    last = GENESIS
    for number, line in enumerate(whole.splitlines()):
        lines.append(_checked(path, number, line, last))
        last = _hash(line)
        if number + 1 == count and last != head:
            raise LedgerError(f"entry {number} of {path} was edited", remedy=RESTORE)
    if len(lines) < count:
        raise LedgerError(f"{path} was truncated: {count} entries were made, {len(lines)} are left", remedy=RESTORE)
    if len(lines) > 1 and not count:
        raise LedgerError(f"the head of {path} is gone", remedy=RESTORE)
    return Contents(lines, last, len(whole))


def _checked(path: Path, number: int, line: bytes, last: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        chained = entry["seq"] == number and entry["prev"] == last and isinstance(entry["time"], float | int)
        chained = chained and (number > 0 or isinstance(entry["silo"], str))
    except (ValueError, KeyError, TypeError):
        chained = False
    if not chained:
        raise LedgerError(
            f"{path} does not hold together at entry {number}: one there or before was edited, moved or lost",
            remedy=RESTORE,
        )
    return dict(entry)


def _read_head(path: Path) -> tuple[int, str]:
    try:
        count, last = path.read_text().split()
        if int(count) < 1:
            raise ValueError(count)
        return int(count), last
    except FileNotFoundError:
        return 0, GENESIS
    except (ValueError, OSError):
        raise LedgerError(f"the ledger's head {path} cannot be read", remedy=RESTORE) from None


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())
