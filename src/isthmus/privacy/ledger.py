"""The ledger: every release of one silo, appended to a file before the tensor is sent, in a chain of hashes.

Each line holds the hash of the line before it; the first names the silo. A second file, the *head*, holds the number of
lines and the hash of the last one, so that a truncated end is detected too. A line is on the disk (fdatasync) before
its frame is sent. The head is written after it, in place and within one sector, without waiting for the disk. So after
a crash the head may be behind the ledger, never ahead of it: complete lines beyond the head are accepted, since more
lines only mean more charges, and an incomplete last line is dropped, since its frame was not sent. Only the first head
is synced, with its folder, so that both files exist after a loss of power.

The order of releases is that of the chain. Times are informative; no charge and no budget depends on them.

The chain reveals accidental and partial changes. A writer of both files can forge all of it; to detect that, keep a
copy of the head's hash where the silo's operator cannot write.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from isthmus.errors import LedgerError, LedgerTakenError
from isthmus.privacy import events
from isthmus.privacy.events import Charge, Release
from isthmus.storage.files import disk_errors

GENESIS = "0" * 64
"""The previous hash of the first line."""
log = logging.getLogger(__name__)
CLOCK_TOLERANCE = 1.0
"""Seconds by which a clock may be set back without a note, as time synchronization does."""
HEAD_BYTES = 96
"""Fixed length of a head, so that it can be overwritten in place."""
RESTORE = "restore the ledger and its head from a backup, or start a new run: the charges are unknown otherwise"


class Ledger(Protocol):
    """A log of one silo's releases."""

    def record(self, release: Release) -> None:
        """Append a release. Call it before the tensor is sent; if it raises, the tensor must not be sent."""
        ...

    def history(self) -> Iterator[Release]:
        """All releases, oldest first."""
        ...

    def close(self) -> None:
        """Give up the ledger, so that another process may open it."""
        ...


class MemoryLedger:
    """A ledger in memory, lost when the process ends."""

    def __init__(self) -> None:
        self.releases: list[Release] = []

    def record(self, release: Release) -> None:
        self.releases.append(release)

    def history(self) -> Iterator[Release]:
        return iter(self.releases)

    def close(self) -> None: ...


@dataclass(frozen=True)
class LedgerContents:
    """A ledger's verified lines."""

    lines: list[dict[str, Any]]
    last: str
    """Hash of the last line."""
    size: int
    """Bytes of all complete lines; anything beyond is an incomplete line."""

    @property
    def time(self) -> float:
        """Time of the last line in seconds since the epoch; 0 if there is none."""
        return float(self.lines[-1]["time"]) if self.lines else 0.0

    def releases(self) -> Iterator[Release]:
        """All releases, oldest first.

        Raises:
            LedgerError: this version does not know one of them.
        """
        return (release_from_json(line["release"]) for line in self.lines if "release" in line)


class FileLedger:
    """A ledger in a file, locked by one process at a time.

    Args:
        path: the file; created if it does not exist. Its head is beside it (``head_of``).
        silo: name of the silo that owns it.
        recipe: hash of the recipe's privacy settings. A change is recorded, not refused: charges do not depend on it.
        begun: whether releases are known to have been made, in which case an empty ledger is an error.
        clock: gives seconds since the epoch.

    Raises:
        LedgerError: the file was truncated or edited, or belongs to another silo.
        LedgerTakenError: another process has it open.
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
        self._lock = threading.Lock()
        """Held from reading the last line's hash to writing the head: a line between them would break the chain."""
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
        """Append a release; it is on the disk when this returns.

        Raises:
            LedgerTakenError: this process is a fork of the one that opened the ledger.
            LedgerError: the ledger is closed.
            DiskFullError: the disk is full; the ledger is unchanged.
        """
        if os.getpid() != self._process:
            raise LedgerTakenError(
                f"{self.path} was opened by the parent process; a forked process cannot write to it",
                remedy="send from the process that joined, or join after the fork, with a run directory of its own",
            )
        values = {"release": release_to_json(release)}
        with self._lock:
            if not self._files:
                raise LedgerError(f"{self.path} is closed", remedy="join again before you send")
            self._append(values)

    def history(self) -> Iterator[Release]:
        return read_ledger(self.path).releases()

    def close(self) -> None:
        self._closing()

    def _open(self) -> LedgerContents:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._files.append(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        try:
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LedgerTakenError(
                f"another process, or an open silo of this one, is writing to the ledger {self.path}",
                remedy="wait for that run to end, close() that silo, or give each silo its own run directory",
            ) from None
        contents = read_ledger(self.path)
        if os.fstat(self._files[0]).st_size > contents.size:
            os.ftruncate(self._files[0], contents.size)
        self._files.append(os.open(head_of(self.path), os.O_RDWR | os.O_CREAT, 0o600))
        self._size = contents.size
        return contents

    def _begin(self, contents: LedgerContents, silo: str, recipe: str, begun: bool) -> None:
        """Check the owner; warn of a clock that is behind; write the first line, or a line for a changed recipe."""
        owner = contents.lines[0]["silo"] if contents.lines else silo
        if owner != silo:
            raise LedgerError(
                f"{self.path} is the ledger of silo {owner!r}, not of {silo!r}",
                remedy="give each silo its own run directory",
            )
        if begun and not any("release" in line for line in contents.lines):
            raise LedgerError(f"releases were made in this run, but {self.path} holds none", remedy=RESTORE)
        if self._clock() < self._time - CLOCK_TOLERANCE:
            log.warning(
                "the clock is %.0f s behind the last entry of %s; entries say so and keep their order, charges are the "
                "same",
                self._time - self._clock(),
                self.path,
            )
        recipes = [line["recipe"] for line in contents.lines if "recipe" in line]
        if not recipes:
            self._append({"silo": silo, "recipe": recipe, "version": 1})
            self._sync_head()
        elif recipes[-1] != recipe:
            self._append({"recipe": recipe})

    def _append(self, values: dict[str, Any]) -> None:
        now = math.floor(self._clock() * 1000) / 1000
        entry: dict[str, Any] = {"seq": self._count, "time": max(now, self._time), "prev": self._last}
        if now < self._time - CLOCK_TOLERANCE:
            entry["behind"] = round(self._time - now, 3)  # the clock was set back, or had been ahead
        line = json.dumps(entry | values, allow_nan=False).encode()
        with disk_errors(self.path):
            self._write(line + b"\n")
            self._count, self._last, self._time = self._count + 1, _hash(line), entry["time"]
            os.pwrite(self._files[1], f"{self._count} {self._last}\n".ljust(HEAD_BYTES).encode(), 0)

    def _sync_head(self) -> None:
        """Wait until the first head and the folder's entries of both files are on the disk."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            with disk_errors(self.path):
                os.fsync(self._files[1])
                os.fsync(folder)
        finally:
            os.close(folder)

    def _write(self, data: bytes) -> None:
        """Append to the file and wait for the disk; if that fails, restore the old length."""
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
    """The path of the head of the ledger at ``path``."""
    return path.with_suffix(".head")


def read_ledger(path: Path) -> LedgerContents:
    """The complete lines of a ledger, verified against one another and the head; none if the file does not exist.

    May be called while another process appends.

    Raises:
        LedgerError: a line is missing, edited or out of order, or the head is missing.
    """
    count, head = _read_head(head_of(path))
    data = path.read_bytes() if path.exists() and path.stat().st_size else b""
    whole = data[: data.rfind(b"\n") + 1]
    lines: list[dict[str, Any]] = []
    last = GENESIS
    for number, line in enumerate(whole.splitlines()):
        lines.append(_parse_line(path, number, line, last))
        last = _hash(line)
        if number + 1 == count and last != head:
            raise LedgerError(f"entry {number} of {path} was edited: its hash differs from the head's", remedy=RESTORE)
    if len(lines) < count:
        raise LedgerError(f"{path} was truncated: {len(lines)} of {count} entries are left", remedy=RESTORE)
    if len(lines) > 1 and not count:
        raise LedgerError(f"the head of {path} is missing", remedy=RESTORE)
    return LedgerContents(lines, last, len(whole))


def _parse_line(path: Path, number: int, line: bytes, last: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        chained = entry["seq"] == number and entry["prev"] == last and isinstance(entry["time"], float | int)
        chained = chained and (number > 0 or isinstance(entry["silo"], str))
    except (ValueError, KeyError, TypeError):
        chained = False
    if not chained:
        raise LedgerError(
            f"the chain of {path} is broken at entry {number}: that entry or an earlier one was edited, moved or lost",
            remedy=RESTORE,
        )
    return dict(entry)


def _read_head(path: Path) -> tuple[int, str]:
    try:
        text = path.read_text(encoding="utf-8")
        if not text:  # the process ended between making the file and writing it: the ledger has no release yet
            return 0, GENESIS
        count, last = text.split()
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


def release_to_json(release: Release) -> dict[str, Any]:
    """The release as a ledger's line holds it. A charge is a number if purely Gaussian, null if unbounded, and
    otherwise the list ``[gaussian, pure]`` or ``[gaussian, pure, concentrated]``. Only evaluations say that they are.
    """
    charges = {charge.record: _charge_to_json(charge) for charge in release.charges}
    values = asdict(release) | {"charges": charges}
    if not release.evaluation:
        del values["evaluation"]
    return values


def release_from_json(values: dict[str, Any]) -> Release:
    """The release that ``release_to_json`` wrote.

    Raises:
        LedgerError: this version does not know such a release, so its cost cannot be composed.
    """
    try:
        charges = tuple(_charge_from_json(record, value) for record, value in values["charges"].items())
        release = Release(**{**values, "charges": charges})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unknown(values) from error
    known = (release.path, events.Path), (release.mechanism, events.MechanismName), (release.unit, events.Unit)
    if any(value not in get_args(kind) for value, kind in known) or not isinstance(release.evaluation, bool):
        raise _unknown(values)
    return release


def _charge_to_json(charge: Charge) -> Any:
    if math.inf in (charge.gaussian, charge.pure, charge.concentrated):
        return None
    if charge.concentrated:
        return [charge.gaussian, charge.pure, charge.concentrated]
    return [charge.gaussian, charge.pure] if charge.pure else charge.gaussian


def _charge_from_json(record: str, value: Any) -> Charge:
    if value is None:
        return Charge(record, math.inf)
    if isinstance(value, list) and len(value) < 2:
        raise ValueError(record)
    charge = Charge(record, *map(float, value if isinstance(value, list) else [value]))
    if not charge.bounded or min(charge.gaussian, charge.pure, charge.concentrated) < 0:
        raise ValueError(record)
    return charge


def _unknown(values: dict[str, Any]) -> LedgerError:
    return LedgerError(
        f"the ledger holds an event that cannot be accounted: {str(values)[:200]}",
        remedy="read it with the version of isthmus that wrote it, or start a new run",
    )
