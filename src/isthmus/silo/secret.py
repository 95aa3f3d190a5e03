"""Secrets that a silo keeps in its own directory."""

from __future__ import annotations

import secrets
from pathlib import Path

from isthmus.report.record import disk_errors, writing


def kept_secret(path: Path) -> bytes:
    """The 32 random bytes in this file, made when they are first needed; only its owner may read it.

    Raises:
        DiskFullError: there is no room for it.
    """
    with disk_errors(path):
        if path.exists():
            return path.read_bytes()
        with writing(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(secrets.token_bytes(32))
        return path.read_bytes()
