"""``[task]``: the fields that templates use."""

from __future__ import annotations

import pytest

from isthmus.recipe import TaskSection


@pytest.mark.parametrize(
    ("prompt", "answer", "fields"),
    [
        ("{prompt}", "{answer}", {"prompt", "answer"}),
        ("{a.b} and {c[d]}: {a}", "", {"a", "c"}),
        ("no field", "{{none}}", set()),
        ("{a!r:>{width}}", "x", {"a"}),
        ("{open", "{answer}", set()),
    ],
)
def test_the_fields_of_templates(prompt: str, answer: str, fields: set[str]) -> None:
    assert TaskSection(prompt=prompt, answer=answer).fields == fields
