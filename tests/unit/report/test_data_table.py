"""Silos' rows as people read them: nothing that a file holds reaches the terminal as a command."""

from __future__ import annotations

import io
import json

from rich.console import Console

from isthmus.data.summary import DataSummary, Duplicate, Lengths, SetSummary, ShownExample, SiloSummary
from isthmus.report.data_table import SHOWN_DUPLICATES, data_json, show_data, visible

HOSTILE = "\x1b]0;owned\x07[red]\u202e\x9b2J\n"
SETS = {
    "train": SetSummary(30, Lengths(3, 7.5, 19, 600), 3, 10, {" yes": 20, HOSTILE: 10}),
    "held out": SetSummary(0, None, 0, 0, {}),
}
SILO = SiloSummary(
    "north", SETS, [ShownExample("f:1", HOSTILE, " yes")], ["look here"], {"x": 3}, 2, "f:3 is bad\n  remedy: x"
)  # type: ignore[arg-type]
SUMMARY = DataSummary([SILO], [Duplicate("several silos", [f"a: f:{n}", "b: g:1"]) for n in range(9)])


def shown(summary: DataSummary) -> str:
    out = io.StringIO()
    show_data(summary, Console(file=out, width=160, force_terminal=False))
    return out.getvalue()


def test_all_that_was_found_is_shown() -> None:
    text = shown(SUMMARY)
    for part in (
        "25.0%",
        "10.0%",
        "19",
        "600",
        "answers: north, train: ' yes' 20, '\\x1b",
        "warning: north: look here",
        "error: north: f:3 is bad",
        "divided by field: north: 'x' 3",
    ):
        assert part in text
    assert text.count("one prompt in several silos: a: f:") == SHOWN_DUPLICATES
    assert "9 prompts in all stand in several silos" in text
    assert ">  yes" in text


def test_control_characters_are_shown_as_escapes() -> None:
    text = shown(SUMMARY)
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text)
    assert "| \\x1b]0;owned\\x07[red]\\u202e\\x9b2J\\n" in text
    assert visible("plain é \u2028") == "plain é \\u2028"


def test_json_holds_all_of_it() -> None:
    found = json.loads(data_json(SUMMARY))
    assert found["silos"][0]["sets"]["train"]["lengths"] == {"least": 3, "median": 7.5, "p95": 19, "most": 600}
    assert found["silos"][0]["examples"][0]["prompt"] == HOSTILE
    assert len(found["duplicates"]) == 9
