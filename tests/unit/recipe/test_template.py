"""``recipes/federation.toml``: every key once, with its docstring and its default."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from isthmus.recipe import Recipe
from isthmus.recipe.section import Section
from isthmus.recipe.template import WIDTH, docstrings, subtable, template

SHIPPED = Path(__file__).parents[3] / "recipes" / "federation.toml"
EXPERIMENTAL = {
    *("train.momentum", "train.proximal", "train.sharpness"),
    *("boundary.denoise", "boundary.defence.answer", "boundary.defence.inverter", "boundary.defence.correlation"),
    *("boundary.forward.mechanism", "boundary.gradient.mechanism", "boundary.update.mechanism"),
    *("sensitivity.attention", "sensitivity.classes.noise"),
    *("federation.lora", "federation.normalized", "federation.control"),
    *(f"federation.{table}.kind" for table in ("weights", "fairness", "optimizer", "compression")),
    *("federation.robust.rule", "federation.robust.trusted", "federation.asynchronous.buffer"),
    *("federation.clip.quantile", "silo.rank", "trunk.max_silo_norm"),
}
"""Keys of which the whole feature, or some values, have no recorded benefit on a real model."""


def keys(section: type[Section] = Recipe, path: str = "") -> Iterator[tuple[str, type[Section], FieldInfo]]:
    """Every key that is no table, with its section."""
    for key, field in section.model_fields.items():
        inner = subtable(field)
        if inner is None:
            yield f"{path}{key}", section, field
        else:
            yield from keys(inner, f"{path}{key}.")


def uncommented() -> str:
    """The file with all that is left out by default."""
    return re.sub(r"^#(?=[^ ])", "", template(), flags=re.MULTILINE)


def found(values: Any, path: str) -> list[Any]:
    """The values of a key in all tables of its name."""
    if isinstance(values, list):
        return [one for table in values for one in found(table, path)]
    first, _, rest = path.partition(".")
    if path.startswith("sensitivity.classes."):
        return found(values["sensitivity"]["classes"]["high"], path.rpartition(".")[2])
    if first not in values:
        return []
    return found(values[first], rest) if rest else [values[first]]


def test_the_shipped_file_is_what_the_docstrings_say() -> None:
    assert SHIPPED.read_text(encoding="utf-8") == template(), "run 'make recipe'"


def test_it_is_a_recipe_of_all_defaults() -> None:
    recipe = Recipe.of(tomllib.loads(template()))
    silos = [
        {"name": silo.name, "train": silo.train[0], "held_out": silo.held_out and silo.held_out[0]}
        for silo in recipe.silo
    ]
    assert recipe == Recipe.of({"model": {"path": "model"}, "silo": silos})
    assert len(silos) == 2


def test_it_names_every_key_with_its_default() -> None:
    values = tomllib.loads(uncommented())
    for path, _, field in keys():
        shown = found(values, path)
        assert shown, path
        if not field.is_required() and field.default and not path.startswith(("boundary.", "silo.")):
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert shown == [default], path


def test_it_names_no_other_key() -> None:
    def paths(values: Any, path: str) -> set[str]:
        if isinstance(values, list) and values and isinstance(values[0], dict) and path != "model.moves.":
            return {one for table in values for one in paths(table, path)}
        if not isinstance(values, dict) or path in ("sensitivity.detectors.", "sensitivity.fields.", "silo.columns."):
            return {path.removesuffix(".")}
        return {one for key, value in values.items() for one in paths(value, f"{path}{key}.")}

    named = {path.replace("classes.high", "classes") for path in paths(tomllib.loads(uncommented()), "")}
    assert named == {path for path, _, _ in keys()}


@pytest.mark.parametrize(("path", "section", "field"), keys(), ids=[path for path, _, _ in keys()])
def test_each_key_has_a_docstring_and_an_example_that_fits(path: str, section: type[Section], field: FieldInfo) -> None:
    words = docstrings(section)[path.rpartition(".")[2]]
    assert words.endswith(".")
    if field.is_required() or field.default is None:
        (example,) = field.examples or ()
        key = path.rpartition(".")[2]
        TypeAdapter(section.model_fields[key].rebuild_annotation()).validate_python(example)
    if field.default is None:
        assert "Left out: " in words or "only there" in words or "eeded by" in words or "Set this or" in words


def test_each_docstring_is_there_once() -> None:
    """As a comment of its own, with the values that do not fit beside the key."""
    blocks = re.findall(r"((?:^# .*\n)+)#?[\w]+ =", template(), flags=re.MULTILINE)
    said = [" ".join(re.sub(r"^# ", "", block, flags=re.MULTILINE).split()) for block in blocks]
    explained = {(section, path.rpartition(".")[2]) for path, section, _ in keys()}
    expected = [docstrings(section)[key] for section, key in explained]
    assert sorted(re.sub(r" Values: .*", "", one) for one in said) == sorted(expected)


def test_experimental_keys_say_so() -> None:
    assert {
        path for path, section, _ in keys() if "xperimental" in docstrings(section)[path.rpartition(".")[2]]
    } == EXPERIMENTAL


def test_its_lines_are_short() -> None:
    assert max(len(line) for line in template().splitlines()) <= WIDTH
