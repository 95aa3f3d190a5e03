"""The ledger: every release of one silo, appended to a file before the tensor leaves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

from isthmus.privacy.events import Release
from isthmus.report.record import Journal


class Ledger(Protocol):
    def record(self, release: Release) -> None:
        """Note a release; if this raises, nothing leaves."""
        ...


class MemoryLedger:
    """A ledger that lasts as long as the process."""

    def __init__(self) -> None:
        self.releases: list[Release] = []

    def record(self, release: Release) -> None:
        self.releases.append(release)


class FileLedger:
    """A ledger in a JSONL file, one release a line."""

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path)

    def record(self, release: Release) -> None:
        self._journal.append({"time": round(time.time(), 3), **release.to_dict()})
