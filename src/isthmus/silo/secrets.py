"""A silo's secrets and its ledger, in the silo's own directory."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from isthmus.errors import RunError
from isthmus.privacy.ledger import FileLedger
from isthmus.recipe import Recipe
from isthmus.storage.files import disk_errors, private_folder, writing
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.storage.sealed import DamagedError, seal, unseal


def read_secret(path: Path) -> bytes:
    """The 32 random bytes in a file, which is created, readable by its owner alone, if it does not exist.

    Raises:
        DiskFullError, RunError: the file cannot be read or written.
        RunError: the file is damaged: another key would give records and examples other names.
    """
    with disk_errors(path):
        if not path.exists():
            with writing(path) as temporary:
                temporary.write_bytes(seal(secrets.token_bytes(32)))
        try:
            return bytes(unseal(path.read_bytes()))
        except DamagedError as error:
            raise RunError(
                f"the key {path} cannot be used: {error}",
                remedy="restore it from a backup; without it start a new run, as budgets are counted by its names",
            ) from error


def open_ledger(directory: RoleDirectory, recipe: Recipe, name: str) -> FileLedger:
    """The silo's verified ledger, opened for writing.

    Args:
        directory: the silo's directory of the run.
        name: the silo's name in the recipe.

    Raises:
        LedgerError: the ledger was changed or deleted, or another process has it open.
    """
    with disk_errors(directory.path):
        private_folder(directory.path)
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
