"""Rows of data as JSON lines, and the folder that real data sets lie in."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("ISTHMUS_DATA", "../shared/data"))
Values = dict[str, Any]
Rows = list[Values]


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))
