"""Fields of rows: text, lists and labels, or a refusal that names the field."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.errors import DataError
from isthmus.tasks.task import choose, label_of, list_of, text_of

NAMES = ("no", "yes")


@pytest.mark.parametrize("value", [None, "", " \n", 3, float("nan"), ["text"], {"text": "a"}, b"text", True])
def test_what_is_no_text_is_refused_by_name(value: Any) -> None:
    for row in ({"passage": {"text": value}}, {"passage": {}}, {"passage": "text"}, {}):
        with pytest.raises(DataError, match=r"'passage\.text'") as caught:
            text_of(row, "passage", "text")
        assert caught.value.remedy


def test_text_has_no_white_space_around_it() -> None:
    assert text_of({"a": {"b": " one two\n"}}, "a", "b") == "one two"


@pytest.mark.parametrize("value", [None, [], "text", b"bytes", 3, {"a": 1}])
def test_what_is_no_list_is_refused_by_name(value: Any) -> None:
    with pytest.raises(DataError, match="'parts'"):
        list_of({"parts": value}, "parts")


def test_a_list_of_a_row() -> None:
    assert list_of({"a": {"b": (1, 2)}}, "a", "b") == [1, 2]


@pytest.mark.parametrize(("label", "name"), [(0, "no"), (1, "yes"), (True, "yes"), (False, "no"), (" Yes ", "yes")])
def test_labels_by_number_truth_or_name(label: Any, name: str) -> None:
    assert label_of({"label": label}, NAMES) == name


@pytest.mark.parametrize("label", [None, -1, 2, "maybe", 1.0, float("nan"), []])
def test_a_label_that_is_none_is_refused(label: Any) -> None:
    with pytest.raises(DataError, match="not one of no, yes") as caught:
        label_of({"label": label}, NAMES)
    assert "split" in str(caught.value.remedy)


def test_an_item_of_named_choices() -> None:
    item = choose("Is it?", "yes", {"no": " no", "yes": " yes"}, "g")
    assert (item.answer, item.right, item.choices, item.names, item.group) == (
        " yes",
        ("yes",),
        (" no", " yes"),
        ("no", "yes"),
        "g",
    )
