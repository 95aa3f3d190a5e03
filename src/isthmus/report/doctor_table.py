"""What a doctor found of a party: a line for each check."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.text import Text

from isthmus.engines.doctor import Diagnosis
from isthmus.engines.reachability import Finding
from isthmus.report.data_table import visible
from isthmus.report.formatting import TABLE_WIDTH

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def show_diagnosis(found: Diagnosis, console: Console) -> None:
    """Print a line for each check, with the remedy below it, and at the end what a round is estimated to take."""
    for finding in found.findings:
        for line in _lines(finding):
            console.print(line, soft_wrap=True, highlight=False)
    for text in _estimate(found), _verdict(found):
        for piece in textwrap.wrap(text, TABLE_WIDTH):
            console.print(Text(piece), soft_wrap=True, highlight=False)


def _lines(finding: Finding) -> list[Text]:
    words = visible(f"{finding.check}: {finding.words}")
    texts = textwrap.wrap(words, TABLE_WIDTH - 9, break_on_hyphens=False)
    lines = [Text.assemble((f"{finding.state:9}", STYLES[finding.state]), texts[0])]
    lines += [Text(f"{'':9}{text}") for text in texts[1:]]
    if finding.remedy and finding.state != "ok":
        remedy = textwrap.wrap(visible(f"remedy: {finding.remedy}"), TABLE_WIDTH - 11, break_on_hyphens=False)
        lines += [Text(f"{'':11}{text}", "dim") for text in remedy]
    return lines


def _estimate(found: Diagnosis) -> str:
    if found.dry_run is None or found.round_seconds is None or not found.run_seconds:
        return ""
    update = f"{found.dry_run.update / 1e6:,.1f} MB of updates in each"
    return (
        f"about {_duration(found.round_seconds)} a round and {_duration(found.run_seconds)} for the whole run, "
        f"without evaluations and waiting for other silos; {update}"
    )


def _verdict(found: Diagnosis) -> str:
    counts = {state: sum(one.state == state for one in found.findings) for state in STYLES}
    who = f"{found.role} {found.party}: " if found.party and found.role != found.party else ""
    return f"{who}{counts['ok']} ok, {counts['warning']} to look at, {counts['failed']} failed"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"
