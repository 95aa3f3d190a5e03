"""Certificates for a whole federation."""

from __future__ import annotations

from pathlib import Path

from isthmus.recipe import Recipe
from isthmus.storage.record import disk_errors
from isthmus.wire.identity import Authority, save_identity


def make_certificates(recipe: Recipe, folder: Path) -> None:
    """Certificates for every party of a recipe, by one new authority whose key is then forgotten."""
    authority = Authority()
    shared = recipe.trunk.address == recipe.root.address
    with disk_errors(folder):
        save_identity(authority.issue("trunk", also=("root",) if shared else ()), folder)
        save_identity(authority.issue("root"), folder)
        for name in recipe.tree.parties:
            save_identity(authority.issue(name), folder)


def complete(recipe: Recipe, folder: Path) -> bool:
    """Whether each party of the recipe has a certificate there."""
    return all((folder / name / "cert.pem").exists() for name in ("trunk", "root", *recipe.tree.parties))
