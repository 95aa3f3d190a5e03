"""What two processes have used so far, noted as JSON lines. Both sides of the comparison note with it.

Imports the standard library alone, since it also runs in the other code's environment.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

TICK = 1 / os.sysconf("SC_CLK_TCK")


class Meter:
    """Notes wall time, processor time and peak memory of two processes, one line a call.

    Args:
        path: the file for the lines.
        server: process id of the part in the middle; the other process is this one.
    """

    def __init__(self, path: Path, server: int) -> None:
        self._path = path
        self._processes = (os.getpid(), server)

    def note(self, **values: Any) -> None:
        """Add a line: ``seconds`` of a clock, ``processor`` seconds and ``peak`` bytes of both processes together."""
        line = {
            "seconds": time.perf_counter(),
            "processor": sum(map(processor_seconds, self._processes)),
            "peak": sum(map(peak_bytes, self._processes)),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line | values) + "\n")


def processor_seconds(process: int) -> float:
    """User and system time of all threads of a process so far, in steps of a clock tick (10 ms)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def peak_bytes(process: int) -> int:
    """Most bytes that a process held in memory at once so far, loading included."""
    status = Path(f"/proc/{process}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
