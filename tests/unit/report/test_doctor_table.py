"""A diagnosis on a terminal of 80 columns, and as JSON."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from isthmus.engines.doctor import Diagnosis
from isthmus.engines.dry_run import DryRun
from isthmus.engines.reachability import Finding
from isthmus.report.doctor_table import show_diagnosis

FINDINGS = (
    Finding("recipe", "ok", "recipe.toml: 2 silos", "not shown"),
    Finding("trunk", "failed", "nothing listens at trunk.example.org:7001 " * 3, "start the server"),
    Finding("clock of trunk", "warning", "90 s behind this machine's", "set both clocks by a time server (NTP)"),
)
DRY = DryRun(10, 0.5, 0.25, "", 1000, 2000, 3000, 4_000_000, 5_000_000)


def shown(found: Diagnosis) -> str:
    out = io.StringIO()
    show_diagnosis(found, Console(file=out, width=80))
    return out.getvalue()


def test_a_line_for_each_check_with_remedies_where_something_is_to_do() -> None:
    text = shown(Diagnosis("north", "silo", FINDINGS, DRY, 90.0, 180_000.0))
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("ok       recipe: recipe.toml: 2 silos\nfailed   trunk: nothing listens")
    assert "           remedy: start the server\n" in text
    assert "not shown" not in text
    assert "about 90 s a round and 2.1 days for the whole run" in " ".join(text.split())
    assert "4.0 MB of updates" in " ".join(text.split())
    assert text.splitlines()[-1] == "silo north: 1 ok, 1 to look at, 1 failed"


@given(st.text(max_size=300), st.text(max_size=300))
def test_whatever_a_server_says_fits_and_obeys_no_escapes(words: str, remedy: str) -> None:
    text = shown(Diagnosis("north", "silo", (Finding("trunk", "failed", words, remedy),)))
    assert "\x1b" not in text
    assert all(len(line) <= 80 for line in text.split("\n"))
