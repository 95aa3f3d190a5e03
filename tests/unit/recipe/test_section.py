"""The base of all tables: frozen, typed, no key that is unknown, and a bare value for the main one."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from isthmus.recipe.section import Amount, Bound, Chance, Count, Device, Momentum, Name, Positive, Section


class Table(Section):
    main = "kind"
    kind: str = "none"
    size: int = 1


def test_a_bare_value_sets_the_main_key() -> None:
    assert Table.model_validate("top") == Table(kind="top")
    assert Table.model_validate({"size": 2}) == Table(size=2)


@pytest.mark.parametrize("values", [{"sise": 2}, {"size": "2"}, {"size": 1.0}, 3])
def test_unknown_keys_and_other_types_are_refused(values: Any) -> None:
    with pytest.raises(ValidationError):
        Table.model_validate(values)


def test_a_table_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Table().size = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Count, [1, 9], [0, -1]),
        (Amount, [0.0, 5.0], [-0.1, float("inf"), float("nan")]),
        (Positive, [0.1], [0.0, float("inf")]),
        (Chance, [0.5], [0.0, 1.0]),
        (Momentum, [0.0, 0.9], [1.0, -0.1]),
        (Bound, [1.0, 4.0], [0.9]),
        (Device, ["cpu", "cuda", "cuda:1", "auto"], ["gpu", "cuda:", "cuda:a"]),
        (Name, ["a", "north-1"], ["", "A", "-a", "a" * 64]),
    ],
)
def test_values_have_their_ranges(kind: Any, good: list[Any], bad: list[Any]) -> None:
    adapter = TypeAdapter(kind)
    assert [adapter.validate_python(value) for value in good] == good
    for value in bad:
        with pytest.raises(ValidationError):
            adapter.validate_python(value)
