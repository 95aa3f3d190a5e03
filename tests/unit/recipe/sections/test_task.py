"""``[task]``: the fields that templates use."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

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


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"chat": True, "messages": ["m"]}, "exclude one another"),
        ({"messages": ["m"], "text": "{a}"}, "exclude one another"),
        ({"text": "{a}", "prompt": "{b}"}, "takes the place of task.prompt"),
        ({"messages": ["m"], "answer": "{b}"}, "takes the place of task.answer"),
        ({"system": "so"}, r"needs task\.chat or task\.messages"),
        ({"text": "{a}", "choices": ["b"]}, "no answer"),
        ({"truncate": "end"}, "truncate"),
    ],
)
def test_a_row_has_one_form(values: dict[str, object], error: str) -> None:
    with pytest.raises(ValidationError, match=error):
        TaskSection.model_validate(values)


def test_what_is_asked_and_used_in_each_form() -> None:
    templates = TaskSection(prompt="{a.b} {c[0]} {a.b}", answer="{d}", chat=True, system="so")
    assert (templates.asked, templates.fields) == (("a.b", "c[0]"), {"a", "c", "d"})
    for form, used in (({"messages": ("m", "n")}, {"m", "n"}), ({"text": "{e.f}"}, {"e"})):
        assert (TaskSection(**form).asked, TaskSection(**form).fields) == ((), used)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "gap"), [("{a}: ", " "), ("{a}:", ""), ("{a}:\n", ""), ("{a}  ", "  "), (" ", ""), ("", "")]
)
def test_spaces_at_the_prompts_end_are_read_with_the_choices(prompt: str, gap: str) -> None:
    task = TaskSection(prompt=prompt, choices=("yes", " no"))
    assert (task.gap, task.continuations) == (gap, (f"{gap}yes", f"{gap} no"))
    assert TaskSection(prompt=prompt, choices=("yes",), chat=True).continuations == ("yes",)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "rte"},
        {"name": "coqa", "chat": True, "system": "so"},
        {"messages": ["m"], "system": "so", "choices": ["a", "b"]},
        {"text": "{a}", "join": ", "},
        {"chat": True, "prompt": "{a} ", "truncate": "middle"},
    ],
)
def test_what_a_run_writes_down_is_read_again(values: dict[str, object]) -> None:
    """With every key, those that the form does not use as well."""
    task = TaskSection.model_validate(values)
    assert TaskSection.model_validate(task.model_dump(mode="json", exclude_none=True)) == task
