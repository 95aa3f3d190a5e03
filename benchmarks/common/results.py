"""Result rows: what was measured, against which goal, how, where and when."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

SPREAD = re.compile(r", (range|lowest|highest|median) of \d+( seeds)?$")
"""The end of a measure's name that says from how many runs it is."""
RESULTS = Path(__file__).parents[1] / "results"
DEVICE = os.environ.get("ISTHMUS_DEVICE", "cpu")
"""Where models of real size compute, in benchmarks that do not time them."""


@dataclass(frozen=True)
class Row:
    measure: str
    value: float | None
    """None: infinite."""
    unit: str
    goal: str | None
    met: bool | None
    command: str
    hardware: str
    date: str


class Results:
    """Rows of one benchmark, printed as they come and written as JSON at the end."""

    def __init__(self, name: str, command: str, device: torch.device | None = None) -> None:
        self._name = name
        self._command = command
        self._hardware = hardware(device)
        self.rows: list[Row] = []

    def add(
        self, measure: str, value: float, unit: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Note a figure; a goal is an upper or a lower bound."""
        goal = f"≤ {at_most}" if at_most is not None else f"≥ {at_least}" if at_least is not None else None
        met = value <= at_most if at_most is not None else value >= at_least if at_least is not None else None
        today = datetime.date.today().isoformat()
        noted = round(value, 4) if math.isfinite(value) else None
        row = Row(measure, noted, unit, goal, met, self._command, self._hardware, today)
        self.rows.append(row)
        verdict = "" if met is None else f"   goal {goal}: {'met' if met else 'MISSED'}"
        print(f"{measure}: {round(value, 4):g} {unit}{verdict}", flush=True)

    def write(self, *, keep: bool = False) -> Path:
        """Write the rows; ``keep`` those of earlier runs that this one did not measure again."""
        path = self._path
        path.parent.mkdir(exist_ok=True)
        earlier = self._others() if keep else []
        rows = earlier + [asdict(row) for row in self.rows]
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        return path

    def known(self) -> dict[str, float | None]:
        """The values of all measures, of this run or, where it has none, of an earlier one."""
        earlier = {row["measure"]: row["value"] for row in self._others()}
        return earlier | {row.measure: row.value for row in self.rows}

    def _others(self) -> list[dict[str, Any]]:
        """Rows of earlier runs of what this one did not measure, not even in another number of runs."""
        measured = {SPREAD.sub("", row.measure) for row in self.rows}
        return [row for row in self._earlier() if SPREAD.sub("", row["measure"]) not in measured]

    def _earlier(self) -> list[dict[str, Any]]:
        return json.loads(self._path.read_text()) if self._path.exists() else []

    @property
    def _path(self) -> Path:
        return RESULTS / f"{self._name}.json"


def note(
    results: Results,
    measure: str,
    values: Sequence[float],
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> None:
    """The mean over seeds, and the distance of the highest from the lowest, as two rows; a goal is the mean's."""
    results.add(measure, statistics.fmean(values), unit, at_most=at_most, at_least=at_least)
    if len(values) > 1:
        results.add(f"{measure}, range of {len(values)} seeds", max(values) - min(values), unit)


def repeated(
    results: Results,
    measure: str,
    values: Sequence[float],
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> None:
    """The median of repeated measurements, and the lowest and the highest, as rows; a goal is the median's."""
    results.add(measure, statistics.median(values), unit, at_most=at_most, at_least=at_least)
    results.add(f"{measure}, lowest of {len(values)}", min(values), unit)
    results.add(f"{measure}, highest of {len(values)}", max(values), unit)


def hardware(device: torch.device | None = None) -> str:
    """The processor and the number of threads torch uses, and the accelerator, if one is."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    processor = f"{model}, {torch.get_num_threads()} cores"
    if device is None or device.type != "cuda":
        return processor
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; {processor}"
