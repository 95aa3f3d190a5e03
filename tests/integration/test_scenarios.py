"""The shipped recipes of scenarios train: on tiny models and rows of the scenario's form, a round in this process."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from isthmus.engines import opening
from isthmus.engines.batch import answer_file
from isthmus.engines.inference import generate_text
from isthmus.engines.local import create_run
from isthmus.recipe import Recipe
from isthmus.report.privacy_table import read_statements
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from tests.conftest import VOCABULARY, save_tiny_model
from tests.integration.processes import served_here, train_here

RECIPES = Path(__file__).parents[2] / "recipes"
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s>\n{% endfor %}assistant :"
Row = Callable[[int], dict[str, Any]]
ROWS: dict[str, Row] = {
    "hospital-notes": lambda n: {
        "dialogue": f"w{n + 4} w5 2024-01-0{n + 1}",
        "section_header": "GENHX",
        "section_text": f"w{n + 9}",
    },
    "paper-questions": lambda n: {
        "question": f"w{n + 4}",
        "contexts": ["w5 w6", "w7"],
        "final_decision": ("yes", "no", "maybe")[n % 3],
    },
    "bank-intents": lambda n: {"text": f"w{n + 4}", "intent": ("transfer", "balance", "pin_change")[n % 3]},
    "sentiment": lambda n: {"text": f"w{n + 4}", "label": ("positive", "negative")[n % 2]},
    "llama-2-7b": lambda n: {
        "messages": [{"role": "user", "content": f"w{n + 4}"}, {"role": "assistant", "content": f"w{n + 9}"}]
    },
    "simulation": lambda n: {"text": f"w{n + 4}", "label": ("w5", "w6")[n % 2]},
}
INFERENCE = {"private-inference"}
"""Recipes by which nothing trains."""
WORDS = ("yes", "no", "maybe", "positive", "negative")


def shipped(name: str) -> dict[str, Any]:
    return tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))


def write_rows(folder: Path, name: str, values: dict[str, Any]) -> None:
    """The files that a recipe names, in the formats and with the columns that it says."""
    files = [(values["partition"]["data"], {})] if "partition" in values else []
    for silo in values["silo"]:
        files += [(silo[key], silo.get("columns", {})) for key in ("train", "held_out") if key in silo]
    for file, columns in files:
        rows = [{columns.get(key, key): value for key, value in ROWS[name](n).items()} for n in range(8)]
        path = folder / file.replace("*", "rows")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as out:
                writer = csv.DictWriter(out, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def on_this_machine(folder: Path, values: dict[str, Any]) -> Recipe:
    """The recipe for one short round with a tiny model without an accelerator."""
    words = [*WORDS, *(choice.strip() for choice in values["task"].get("choices", ()))]
    model = save_tiny_model("llama", folder / "model", vocab_size=VOCABULARY + len(words))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(words)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    values["model"] |= {"path": str(model), "dtype": "float32"}
    values["model"] = {**values["model"], "bottom": 2, "top": 2}
    trains = values.get("train", {}).get("rounds") != 0
    values["train"] = {**values.get("train", {}), **({"rounds": 1, "batch": 2, "evaluate": "end"} if trains else {})}
    values["trunk"] = {}
    values["root"] = {}
    for silo in values["silo"]:
        silo.pop("device", None)
        for key in ("train", "held_out"):
            if key in silo:
                silo[key] = str(folder / silo[key])
    if "partition" in values:
        values["partition"]["data"] = str(folder / values["partition"]["data"])
    return Recipe.of(values)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_scenario_trains(name: str, tmp_path: Path) -> None:
    values = shipped(name)
    write_rows(tmp_path, name, values)
    run: RunDirectory = create_run(on_this_machine(tmp_path, values), tmp_path / "run")
    train_here(run)
    for silo in run.recipe().silo:
        lines = read_journal(run.role(silo.name).path / "metrics.jsonl")
        (step,) = [line for line in lines if line["event"] == "step"]
        assert step["loss"] > 0
        measured = [line["round"] for line in lines if line["event"] == "evaluation"]
        assert measured == ([0, 1] if silo.held_out or "partition" in values else [])


@pytest.mark.parametrize("name", sorted(INFERENCE))
def test_a_scenario_without_training_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a row, as its clinics would: from the folder of a run."""
    recipe = on_this_machine(tmp_path, shipped(name))
    run = create_run(recipe, tmp_path / "run")
    train_here(run)

    @contextmanager
    def serving(run: RunDirectory, *, number: int | None = None) -> Iterator[tuple[None, str]]:
        with served_here(run) as there:
            yield None, there.trunk.address

    monkeypatch.setattr(opening, "serving", serving)
    rows = tmp_path / "questions.jsonl"
    rows.write_text("".join(json.dumps({"text": f"w{n + 4} w5"}) + "\n" for n in range(3)))
    for silo in recipe.silo:
        assert generate_text(run, "w4 w5 w6", silo.name, max_new_tokens=3).split()
        assert answer_file(run, rows, tmp_path / f"{silo.name}.jsonl", silo.name, max_new_tokens=2) == 3
        lines = read_journal(run.role(silo.name).path / "metrics.jsonl")
        assert lines == []
        (statement,) = [one for one in read_statements(run) if one.silo == silo.name]
        assert statement.paths.keys() == {"forward"}
        assert 0 < statement.worst.value < float("inf")


def test_every_scenario_is_tried() -> None:
    ways = {"fair", "fast-federation", "federation", "minimal", "private", "private-updates", "robust"}
    assert {path.stem for path in RECIPES.glob("*.toml")} == ROWS.keys() | INFERENCE | ways
