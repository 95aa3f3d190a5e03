"""Names of people: by titles and phrases, given names, capitals and a list; what is no name stays."""

from __future__ import annotations

import re

import pytest

from isthmus.privacy.names import find_names


def found(text: str, *listed: str) -> list[str]:
    return sorted({text[start:end] for start, end in find_names(listed)(text)})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("I saw Dr. Quibble today.", ["Quibble"]),
        ("My name is Zorblat and I cough.", ["Zorblat"]),
        ("Then Mary Smith came in.", ["Mary Smith"]),
        ("We asked J. R. Hartley twice.", ["J. R. Hartley"]),
        ("He told Mark Olsen.", ["Mark Olsen"]),
        ("She saw Xander Kowalczyk there.", ["Xander Kowalczyk"]),
    ],
)
def test_names_are_found(text: str, names: list[str]) -> None:
    assert found(text) == names


@pytest.mark.parametrize(
    "text",
    ["The patient came on Monday.", "mark this in may", "Blood Pressure was high", "NO ACUTE DISTRESS", "", "  ", "42"],
)
def test_what_is_no_name_stays(text: str) -> None:
    assert found(text) == []


def test_listed_names_are_found_wherever_they_stand() -> None:
    assert found("so said quux-brown, and QUUX-BROWN again; not quux-browne", "Quux-Brown", " ") == [
        "QUUX-BROWN",
        "quux-brown",
    ]


def test_a_listed_name_is_text_and_no_pattern() -> None:
    assert found("a.c abc", "a.c") == ["a.c"]
    assert found("((", "((") == ["(("]
    with pytest.raises(re.error):
        re.compile("((")
