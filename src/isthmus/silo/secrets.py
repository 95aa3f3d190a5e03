"""What a silo holds for itself beside its data: secrets and its ledger, in its own directory."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from isthmus.privacy.ledger import FileLedger
from isthmus.recipe import Recipe
from isthmus.storage.record import RoleDirectory, disk_errors, read_journal, writing


def read_secret(path: Path) -> bytes:
    """A secret of the silo, made when it is first needed."""
    with disk_errors(path):
        if path.exists():
            return path.read_bytes()
        with writing(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(secrets.token_bytes(32))
        return path.read_bytes()


def open_ledger(directory: RoleDirectory, recipe: Recipe, name: str) -> FileLedger:
    """The silo's ledger, verified.

    Raises:
        LedgerError: it is not what this silo wrote, or all of it is gone, or another process has it open, or the clock
            is behind it.
    """
    sums = [section for section in (recipe.federation.noise, recipe.federation.clip) if section is not None]
    sections = (recipe.model, recipe.boundary, recipe.privacy, *sums)
    told = "\n".join(section.model_dump_json() for section in sections)
    trained = any(line.get("tokens") for line in read_journal(directory.path / "metrics.jsonl"))
    return FileLedger(
        directory.path / "ledger.jsonl",
        silo=name,
        recipe=hashlib.sha256(told.encode()).hexdigest()[:32],
        begun=trained,
    )
