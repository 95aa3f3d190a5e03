"""Cells of the tables, each a JSON file that is written as soon as it is measured.

A cell says what determines it. One that was measured under other rows, steps or recipe does not count. All tables take
days, so that the files are kept with the results, answers row by row among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.rows import Values
from isthmus.recipe import Recipe
from isthmus.storage.files import writing

FOLDER = Path(__file__).parents[2] / "results" / "tables"


@dataclass(frozen=True)
class Cell:
    """One measurement of a table.

    Args:
        name: its path in the tables' folder, without suffix.
        determined: everything that the measurement follows from, as JSON has it.
    """

    name: str
    determined: Values

    def found(self) -> Values | None:
        """What was measured; None: nothing, or under other conditions."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        same = isinstance(kept, dict) and kept.get("determined") == json.loads(json.dumps(self.determined))
        result: Values | None = kept["result"] if same else None
        return result

    def measured(self, measure: Callable[[], Values]) -> Values:
        """What was measured, now if it was not before."""
        found = self.found()
        if found is not None:
            return found
        print(f"{self.name} …", flush=True)
        result = measure()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self._path) as partial:
            partial.write_text(json.dumps({"determined": self.determined, "result": result}), encoding="utf-8")
        return result

    @property
    def _path(self) -> Path:
        return FOLDER / f"{self.name}.json"


def digest(value: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def recipe_digest(recipe: Recipe) -> str:
    """Of every key that is not at its default, but the places of files. So what was measured still counts once there
    are new keys; whoever changes a default removes the cells that it changes."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    values["model"].pop("path")
    for silo in values["silo"]:
        silo.pop("train", None)
        silo.pop("held_out", None)
    return digest(values)
