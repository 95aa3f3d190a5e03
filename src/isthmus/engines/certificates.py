"""Certificates for all parties of a federation."""

from __future__ import annotations

from pathlib import Path

from isthmus.recipe import Recipe
from isthmus.storage.files import disk_errors
from isthmus.wire.authority import Authority
from isthmus.wire.identity import save_identity


def make_certificates(recipe: Recipe, folder: Path) -> None:
    """Write a certificate and key for every party of the recipe to ``folder/<party>``.

    One new authority issues them. Its key is not kept, so it can issue no more.

    Raises:
        DiskFullError, RunError: the folder cannot be written.
    """
    authority = Authority()
    shared = recipe.trunk.address == recipe.root.address
    with disk_errors(folder):
        save_identity(authority.issue("trunk", also=("root",) if shared else ()), folder)
        save_identity(authority.issue("root"), folder)
        for name in recipe.tree.parties:
            save_identity(authority.issue(name, recipe.tree.role(name)), folder)


def has_certificates(recipe: Recipe, folder: Path) -> bool:
    """Whether ``folder`` holds a certificate for every party of the recipe."""
    return all((folder / name / "cert.pem").exists() for name in ("trunk", "root", *recipe.tree.parties))
