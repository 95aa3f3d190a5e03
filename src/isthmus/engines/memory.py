"""Memory that a server has freed goes back to the operating system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_memory() -> None:
    """Give freed memory back to the operating system, where the C library (glibc) can: it keeps it for later.

    A server whose silo sent much at once would else stay as large as it was then. Some milliseconds, without the GIL.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
