"""``recipes/federation.toml``: every key of a recipe with its meaning, written from the keys' docstrings.

``python -m isthmus.recipe.template recipes/federation.toml``, or ``make recipe``.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from isthmus.recipe.recipe import Recipe
from isthmus.recipe.section import Section

WIDTH = 100
HEADER = """
Every key of a recipe, its default and its meaning. 'make recipe' writes this file from the docstrings in
src/isthmus/recipe; a first recipe needs only what minimal.toml has. Paths are relative to this file's folder.
A line that begins with # and a key or table is left out by default; the value in it is an example.
"""
SILOS = tuple(
    {"name": name, "train": f"{name}/train.jsonl", "held_out": f"{name}/held_out.jsonl"} for name in ("north", "south")
)
"""The silos of the example."""


def template() -> str:
    """The text of ``recipes/federation.toml``."""
    lines = [*_comment(HEADER), "", *_table(Recipe, "", {})]
    return "\n".join(lines).strip() + "\n"


@cache
def docstrings(section: type[Section]) -> dict[str, str]:
    """By key: its docstring, as one paragraph."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for key, text in zip(tree.body, tree.body[1:], strict=False):
        match key, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                found[name] = _paragraph(words)
    return found


def _table(
    section: type[Section], path: str, values: dict[str, Any], mark: str = "", explain: bool = True
) -> list[str]:
    """The keys of one table and then its subtables, each line begun by ``mark`` if the table is left out by default.

    Args:
        values: the default of each key in this place, where it is not the class's own.
    """
    lines: list[str] = []
    listed = ""
    for key, field in section.model_fields.items():
        if subtable(field) is None:
            allowed = _allowed(field)
            if explain and lines:
                lines.append("")
            same = bool(allowed) and allowed == listed
            lines += _key(section, key, field, values, mark, explain, "the same values" if same else allowed)
            listed = allowed if len(allowed) > WIDTH // 2 else listed
    shown: set[type[Section]] = set()
    for key, field in section.model_fields.items():
        if (inner := subtable(field)) is not None:
            lines += _subtable_lines(section, key, field, inner, path, mark, explain and inner not in shown)
            shown.add(inner)
    return lines


def _key(
    section: type[Section], key: str, field: FieldInfo, values: dict[str, Any], mark: str, explain: bool, allowed: str
) -> Iterator[str]:
    """One key: its docstring, and its value with the other values that it may have."""
    value = values.get(key, None if field.is_required() else field.default)
    if not value and field.examples and not isinstance(value, bool):
        mark, value = mark if value is not None or field.is_required() else "#", field.examples[0]
    line = f"{mark}{key} = {_toml(value)}"
    beside = f"{line:<29} # {allowed}" if allowed and explain else line
    fits = len(beside) <= WIDTH
    if explain:
        words = docstrings(section)[key]
        yield from _comment(words if fits else f"{words} Values: {allowed.removeprefix('or ')}.")
    yield beside if fits else line


def _subtable_lines(
    section: type[Section], key: str, field: FieldInfo, inner: type[Section], path: str, mark: str, explain: bool
) -> Iterator[str]:
    """One subtable with its docstrings; a list of tables once for each example."""
    path = f"{path}.{key}" if path else key
    own = docstrings(section).get(key, "")
    if key == "silo":
        for number, silo in enumerate(SILOS):
            yield from ["", *(_comment(_paragraph(inner.__doc__)) if not number else ()), "[[silo]]"]
            yield from _table(inner, path, silo) if not number else (f"{one} = {_toml(silo[one])}" for one in silo)
        return
    left_out = mark or ("#" if not isinstance(field.default, Section) and not field.is_required() else "")
    many = get_origin(field.annotation) is tuple
    named = f"{path}.high" if get_origin(field.annotation) is dict else path
    yield ""
    if explain:
        yield from _comment(f"{own} {_paragraph(inner.__doc__)}")
    else:
        yield from _comment(f"{own} Keys as above.")
    yield f"{left_out}[[{named}]]" if many else f"{left_out}[{named}]"
    values = field.default.model_dump() if isinstance(field.default, Section) else {}
    yield from _table(inner, named, values, left_out, explain)


def subtable(field: FieldInfo) -> type[Section] | None:
    """The class of the table, or of each table, that is this key's value."""
    for one in _parts(field.annotation):
        if isinstance(one, type) and issubclass(one, Section):
            return one
    return None


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of, but for the values of a ``Literal``."""
    yield annotation
    for one in () if get_origin(annotation) is Literal else get_args(annotation):
        yield from _parts(one)


def _allowed(field: FieldInfo) -> str:
    """The values that a key may have beside the one that is shown, in words; empty where its docstring says it."""
    if len([one for one in get_args(field.annotation) if one is not type(None)]) > 1 and _is_union(field):
        return ""
    kind, limits = _kind(field)
    if get_origin(kind) is Literal:
        others = [value for value in get_args(kind) if value != field.default]
        return ("or " if len(others) < len(get_args(kind)) else "") + ", ".join(_toml(value) for value in others)
    if kind is bool:
        return "or false" if field.default else "or true"
    if kind not in (int, float):
        return ""
    noun = "whole number" if kind is int else "number"
    least = limits.get("ge", limits.get("gt"))
    most = limits.get("le", limits.get("lt"))
    if least is None:
        return noun
    if "ge" in limits and "le" in limits:
        return re.sub(r"e\+", "e", f"{noun}, {least:g} to {most:g}")
    low = f"{least:g} or more" if "ge" in limits else f"above {least:g}"
    if most is None:
        return f"{noun}, {low}"
    return f"{noun}, {low}, {'at most' if 'le' in limits else 'below'} {most:g}"


def _is_union(field: FieldInfo) -> bool:
    return get_origin(field.annotation) in (Union, UnionType)


def _kind(field: FieldInfo) -> tuple[Any, dict[str, Any]]:
    """The type of a key's value without ``None``, and its limits by name."""
    metadata, kind = list(field.metadata), field.annotation
    if _is_union(field):
        kind = next(one for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is Annotated:
        kind, *inner = get_args(kind)
        metadata += [limit for info in inner for limit in getattr(info, "metadata", [info])]
    limits = {
        name: getattr(one, name)
        for one in metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(one, name, None) is not None
    }
    return kind, limits


def _toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    return re.sub(r"e-0*", "e-", repr(value))


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").replace("``", "").split())


def _comment(text: str) -> list[str]:
    return textwrap.wrap(_paragraph(text), WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(template(), encoding="utf-8")
