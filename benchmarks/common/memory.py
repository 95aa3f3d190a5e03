"""Memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def resident() -> int:
    """Bytes in memory now."""
    return counted("VmRSS")


def peak() -> int:
    """Most bytes that were in memory at once since the process started."""
    return counted("VmHWM")


def counted(name: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")
