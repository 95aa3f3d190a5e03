"""Rows to prompts and answers; each unusable file or row is named with its line and a remedy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.sources import SourceRow, read_rows
from isthmus.data.templates import Example, Turn, _Filler, _spans, check_message, fill_templates, no_choice
from isthmus.errors import DataError
from isthmus.recipe import TaskSection

TASK = TaskSection(prompt="{text} is", answer=" {label}")
CHOICE = TaskSection(prompt="{text}", answer="{label}", choices=("yes", "no"))
GOOD = json.dumps({"text": "fine", "label": "yes"})


def examples_of(path: Path, task: TaskSection, classes: Mapping[str, str] | None = None) -> list[Example]:
    return [fill_templates(row, task, classes or {}) for row in read_rows([str(path)])]


def read(tmp_path: Path, content: str | bytes, task: TaskSection = TASK) -> list[Example]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return examples_of(path, task)


def refused(tmp_path: Path, row: Any, task: TaskSection = TASK) -> DataError:
    """The complaint about the third line of a file."""
    line = row if isinstance(row, str | bytes) else json.dumps(row)
    content = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(DataError) as caught:
        read(tmp_path, f"{GOOD}\n\n".encode() + content + b"\n", task)
    assert caught.value.remedy
    assert f"{tmp_path}/rows.jsonl:3" in caught.value.message
    return caught.value


def test_templates_are_filled_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [{"text": "good", "label": "yes", "unused": None}, {"text": "{bad}", "label": 3}]
    found = read(tmp_path, "\n".join(json.dumps(row) for row in rows))
    assert found == [Example("good is", " yes"), Example("{bad} is", " 3")]


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path: Path) -> None:
    assert len(read(tmp_path, f"\r\n{GOOD}\r\n  \n{GOOD}\r\n\n")) == 2


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\ufeff"])
def test_line_separators_of_unicode_within_a_text_are_text(tmp_path: Path, mark: str) -> None:
    row = json.dumps({"text": f"one{mark}two", "label": "yes"}, ensure_ascii=False)
    assert read(tmp_path, f"{row}\n{row}\n") == [Example(f"one{mark}two is", " yes")] * 2


@pytest.mark.parametrize("label", [0, False, 0.0])
def test_a_label_of_zero_is_a_label(tmp_path: Path, label: object) -> None:
    assert read(tmp_path, json.dumps({"text": "t", "label": label})) == [Example("t is", f" {label}")]


def test_formats_and_parts_of_fields_may_be_named(tmp_path: Path) -> None:
    task = TaskSection(prompt="{{x}} {text[en]}", answer="{score:.1f}")
    assert read(tmp_path, '{"text": {"en": "hi"}, "score": 0.25}', task) == [Example("{x} hi", "0.2")]


@pytest.mark.parametrize("row", [{"label": "yes"}, {"text": "fine"}, {}])
def test_a_missing_field(tmp_path: Path, row: dict[str, str]) -> None:
    assert "does not fill the template" in refused(tmp_path, row).message


@pytest.mark.parametrize("empty", ["", "  \n", None])
@pytest.mark.parametrize("name", ["text", "label"])
def test_an_empty_or_null_field(tmp_path: Path, name: str, empty: str | None) -> None:
    error = refused(tmp_path, json.loads(GOOD) | {name: empty})
    assert f"no text in {name!r}" in error.message


@pytest.mark.parametrize("prompt", ["{text}", "{text!r}", "{text[0]}", "{text[a]}", "{text[a][0]}"])
@pytest.mark.parametrize(
    "value", [None, float("nan"), [], {}, ["a"], {"a": "b"}, [None], {"a": None}, {"a": [float("nan")]}, [["x"]]]
)
def test_no_null_nan_or_list_becomes_a_word(tmp_path: Path, prompt: str, value: Any) -> None:
    """A template takes a text out of a list or an object by its part, and nothing else of it."""
    content = json.dumps({"text": value, "label": "yes"})
    task = TaskSection(prompt=prompt, answer="{label}")
    if (prompt, value) == ("{text[0]}", ["a"]):
        assert read(tmp_path, content, task) == [Example("a", "yes")]
    elif prompt in ("{text[a]}", "{text[a][0]}") and value == {"a": "b"}:
        assert read(tmp_path, content, task) == [Example("b", "yes")]
    else:
        with pytest.raises(DataError, match=r":1 (has no text in|does not fill)") as caught:
            read(tmp_path, content, task)
        assert caught.value.remedy


@pytest.mark.parametrize("value", [b"bytes", {1}, object])
def test_what_is_no_text_is_refused_by_its_kind(value: object) -> None:
    with pytest.raises(DataError, match="not a text"):
        fill_templates(SourceRow("f:1", {"text": value, "label": "yes"}), TASK, {})


@pytest.mark.parametrize("line", ["not json", '{"text": "cut off', "{'text': 1}", GOOD + GOOD])
def test_a_line_that_is_no_json(tmp_path: Path, line: str) -> None:
    assert "is not JSON" in refused(tmp_path, line).message


@pytest.mark.parametrize("row", [[1], '"text"', "3", "null"])
def test_a_line_that_is_no_object(tmp_path: Path, row: Any) -> None:
    assert "is not a JSON object" in refused(tmp_path, row).message


@pytest.mark.parametrize("prompt", ["{text[0][en]}", "{text:>9}", "{text:d}", "{text.missing}", "{}", "{0}", "{text"])
def test_a_template_that_does_not_fit_the_row(tmp_path: Path, prompt: str) -> None:
    task = TaskSection(prompt=prompt, answer="{label}")
    content = json.dumps({"text": ["a"], "label": "yes"})
    with pytest.raises(DataError, match=r"rows\.jsonl:1 does not fill the template") as caught:
        read(tmp_path, content, task)
    assert caught.value.remedy


def test_an_answer_that_is_no_choice(tmp_path: Path) -> None:
    error = refused(tmp_path, {"text": "fine", "label": "maybe"}, CHOICE)
    assert "'maybe' is no choice" in error.message
    assert "task.choices" in error.remedy
    assert len(read(tmp_path, GOOD, CHOICE)) == 1


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl holds no row") as caught:
        read(tmp_path, content)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["absent.jsonl", "."])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot read the data file") as caught:
        examples_of(tmp_path / name, TASK)
    assert str(tmp_path / name) in caught.value.message
    assert "path" in caught.value.remedy


def test_another_encoding(tmp_path: Path) -> None:
    error = refused(tmp_path, '{"text": "café", "label": "yes"}'.encode("latin-1"))
    assert "UTF-8" in error.message
    assert "UTF-8" in error.remedy


def test_the_places_of_fields_with_a_class_are_told(tmp_path: Path) -> None:
    """In prompt and answer together, for each time that a template uses them."""
    task = TaskSection(prompt="{{a}} {name!r:>6}, {note} {name}", answer=" {tags[0]}: {name} {score:.{digits}f}")
    row = {"name": "Bo", "note": "é{name}", "tags": ["x", "y"], "score": 0.25, "digits": 1}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (example,) = examples_of(path, task, {"name": "high", "tags": "low", "score": "low"})
    whole = example.prompt + example.answer
    assert whole == "{a}   'Bo', é{name} Bo x: Bo 0.2"
    found = [(whole[start:end], kind) for start, end, kind in example.spans]
    assert found == [("  'Bo'", "high"), ("Bo", "high"), ("x", "low"), ("Bo", "high"), ("0.2", "low")]
    assert examples_of(path, task) == [Example(example.prompt, example.answer)]


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.text(min_size=1, max_size=9).filter(str.strip), min_size=3))
def test_any_fields_text_is_at_its_place(row: dict[str, str]) -> None:
    template = "x{a}{b}{{}}{c}é{a}"
    text = template.format_map(row)
    found = list(_spans(template, row, {"a": "1", "c": "3"}, _Filler("f:1", template, None)))
    assert [(text[start:end], kind) for start, end, kind in found] == [
        (row["a"], "1"),
        (row["c"], "3"),
        (row["a"], "1"),
    ]


def test_another_answer_has_the_classes_of_the_fields_in_this_one() -> None:
    example = Example("ab cd", " yes", ((0, 2, "high"), (6, 9, "low")))
    assert example.answered(" no way") == Example("ab cd", " no way", ((0, 2, "high"), (5, 12, "low")))
    assert Example("ab", "c").answered("d") == Example("ab", "d")


NESTED = {"patient": {"name": "Bo", "age": 4, "drugs": ["x", "y"]}, "findings": ["cough", 39.5], "label": "yes"}


def test_parts_are_named_by_dots_and_lists_are_joined() -> None:
    task = TaskSection(
        prompt="{patient.name} ({patient[age]}): {findings}; {patient.drugs}", answer="{label}", join=", "
    )
    example = fill_templates(SourceRow("f:1", NESTED), task, {"findings": "high", "patient": "low"})
    assert example.prompt == "Bo (4): cough, 39.5; x, y"
    found = [(example.prompt[start:end], kind) for start, end, kind in example.spans]
    assert found == [("Bo", "low"), ("4", "low"), ("cough, 39.5", "high"), ("x, y", "low")]


@pytest.mark.parametrize("value", [[], None, ["a", None], ["a", float("nan")], ["a", ["b"]], [{"a": "b"}], ["a", " "]])
def test_what_is_in_a_joined_list_must_be_text(value: Any) -> None:
    task = TaskSection(prompt="{findings}", answer="{label}", join=", ")
    with pytest.raises(DataError, match=r"f:1 (has no text in|does not fill)"):
        fill_templates(SourceRow("f:1", {**NESTED, "findings": value}), task, {})


@pytest.mark.parametrize(
    "name", ["label.__class__", "findings.__len__", "patient.keys", "label[0].upper", "findings.x"]
)
def test_attributes_of_python_are_no_parts_of_a_row(name: str) -> None:
    with pytest.raises(DataError, match="f:1 does not fill the template") as caught:
        fill_templates(SourceRow("f:1", NESTED), TaskSection(prompt=f"{{{name}}}", answer="{label}", join=" "), {})
    assert caught.value.remedy


def test_a_plain_text_is_all_answer() -> None:
    example = fill_templates(SourceRow("f:1", NESTED), TaskSection(text="{patient.name}: {label}"), {"label": "high"})
    assert example == Example("", "Bo: yes", ((4, 7, "high"),), whole=True)


def test_a_chats_prompt_is_the_users_turn() -> None:
    task = TaskSection(prompt="{label}?", answer="{patient.name}", chat=True, system="Be brief.")
    example = fill_templates(SourceRow("f:1", NESTED), task, {"label": "high", "patient": "low"})
    assert example.turns == (Turn("system", "Be brief."), Turn("user", "yes?"))
    whole = example.prompt + example.answer
    assert [(whole[start:end], kind) for start, end, kind in example.spans] == [("yes", "high"), ("Bo", "low")]


@pytest.mark.parametrize("value", [None, 3, "", " ", ["a"]])
def test_a_message_is_a_text(value: object) -> None:
    with pytest.raises(DataError, match="f:1 has no text in 'content'"):
        check_message("f:1", "content", value)
    assert check_message("f:1", "content", "a") == "a"


@pytest.mark.parametrize(
    ("answer", "choices", "remedy"),
    [
        ("yes", [" yes", " no"], "' yes' begins with a space: begin task.answer with one"),
        (" Yes", [" yes", " no"], "' yes': capital letters count"),
        ("no ", ["yes", "no"], "'no': spaces count"),
        (" no", ["yes", "no"], "'no': spaces count"),
        ("never", ["yes", "no"], "list it in task.choices"),
    ],
)
def test_an_answer_that_nearly_is_a_choice_names_it(answer: str, choices: list[str], remedy: str) -> None:
    error = no_choice(answer, choices, "rows.csv:2")
    assert error.message == f"rows.csv:2: the answer {answer!r} is no choice"
    assert remedy in error.remedy
