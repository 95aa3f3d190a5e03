"""Certificates of a whole federation: one a party, of one authority, the root's name with the trunk's where they share
an address."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from isthmus.engines.certificates import has_certificates, make_certificates
from isthmus.errors import IdentityError, IsthmusError
from isthmus.recipe import Recipe
from isthmus.wire.identity import Identity, Role
from tests.conftest import make_recipe

EDGES = [
    {"name": "left", "address": "localhost:1", "silos": ["a"]},
    {"name": "right", "address": "localhost:2", "silos": ["b"]},
]


def recipe_of(**sections: Any) -> Recipe:
    return make_recipe(Path("none"), silos=("a", "b"), **sections)


def test_every_party_gets_one_of_the_same_authority(tmp_path: Path) -> None:
    recipe = recipe_of(edge=EDGES)
    make_certificates(recipe, tmp_path)
    roles: dict[str, Role] = {
        "trunk": "trunk",
        "root": "root",
        "a": "silo",
        "b": "silo",
        "left": "edge",
        "right": "edge",
    }
    assert {folder.name for folder in tmp_path.iterdir()} == roles.keys()
    assert len({Identity.load(tmp_path, name, role).authority for name, role in roles.items()}) == 1
    for name, role in roles.items():
        for other in set(get_args(Role)) - {role}:
            with pytest.raises(
                IdentityError, match=f"the certificate of {name} is that of the {role}, {other} is needed"
            ):
                Identity.load(tmp_path, name, other)


def test_it_is_complete_once_nobody_lacks_one(tmp_path: Path) -> None:
    assert not has_certificates(recipe_of(), tmp_path)
    make_certificates(recipe_of(), tmp_path)
    assert has_certificates(recipe_of(), tmp_path)
    assert not has_certificates(recipe_of(edge=EDGES), tmp_path), "the edges have none"


def test_a_party_that_the_recipe_lacks_has_none(tmp_path: Path) -> None:
    make_certificates(recipe_of(), tmp_path)
    with pytest.raises(IdentityError, match="c"):
        Identity.load(tmp_path, "c", "silo")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IsthmusError, match="cannot write"):
        make_certificates(recipe_of(), tmp_path / "file" / "certificates")
