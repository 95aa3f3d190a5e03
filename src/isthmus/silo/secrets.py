"""A silo's secrets and its ledger, in the silo's own directory."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from isthmus.privacy.ledger import FileLedger
from isthmus.recipe import Recipe
from isthmus.storage.record import RoleDirectory, disk_errors, read_journal, writing


def read_secret(path: Path) -> bytes:
    """The 32 random bytes in a file, which is created, readable by its owner alone, if it does not exist.

    Raises:
        DiskFullError, RunError: the file cannot be read or written.
    """
    with disk_errors(path):
        if path.exists():
            return path.read_bytes()
        with writing(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(secrets.token_bytes(32))
        return path.read_bytes()


def open_ledger(directory: RoleDirectory, recipe: Recipe, name: str) -> FileLedger:
    """The silo's verified ledger, opened for writing.

    Args:
        directory: the silo's directory of the run.
        name: the silo's name in the recipe.

    Raises:
        LedgerError: the ledger was changed or deleted, another process has it open, or the clock is behind its last
            entry.
    """
    optional = [section for section in (recipe.federation.noise, recipe.federation.clip) if section is not None]
    sections = (recipe.model, recipe.boundary, recipe.privacy, *optional)
    settings = "\n".join(section.model_dump_json() for section in sections)
    trained = any(line.get("tokens") for line in read_journal(directory.path / "metrics.jsonl"))
    return FileLedger(
        directory.path / "ledger.jsonl",
        silo=name,
        recipe=hashlib.sha256(settings.encode()).hexdigest()[:32],
        begun=trained,
    )
