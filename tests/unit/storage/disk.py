"""A disk without room."""

from __future__ import annotations

from pathlib import Path


def full(path: Path) -> Path:
    """A file on a full disk at this path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")
    return path
