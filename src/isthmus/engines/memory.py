"""Memory of this process and this machine: what is used, what is free, and what goes back to the operating system."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def return_memory() -> None:
    """Give freed memory back to the operating system, where the C library (glibc) can: it keeps it for later.

    A server whose silo sent much at once would else stay as large as it was then. Some milliseconds, without the GIL.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """Most bytes that this process has had in memory at once since it started."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> int:
    """Bytes that processes can still take here without swapping: the machine's, or what its control group leaves."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                machine = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # "max" is no number: the group has no limit
        limit, used = (int((_CGROUP / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        return max(0, min(machine, limit - used))
    return machine
