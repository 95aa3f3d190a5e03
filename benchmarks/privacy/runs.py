"""The runs that the privacy benchmarks share: the private recipe's two silos on hutto sentiment, changed or not.

They are kept in ``build/privacy``: what is there is not trained again.
"""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Callable
from pathlib import Path

from benchmarks.common.results import DEVICE
from benchmarks.common.rows import Values, write_lines
from isthmus.demo.assets import hutto, smollm2
from isthmus.engines.local import create_run, run_federation
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory

CACHE, MODEL = Path("build/privacy"), Path("build/demo")
ROWS, HELD_OUT, OTHERS = 250, 100, 500
"""Of each of hutto's four kinds of text: training and held-out rows of each silo, and rows that nobody trains on."""
Change = Callable[[Values], None]


def undefended_run() -> RunDirectory:
    return federation("open", undefended)


def private_run() -> RunDirectory:
    return federation("private", lambda values: None)


def federation(name: str, change: Change) -> RunDirectory:
    """The finished run of the private recipe with this change, trained if it is not there."""
    path = CACHE / name
    run = RunDirectory.open(path) if path.exists() else create_run(recipe_of(change), path)
    if run.completed() < run.recipe().train.rounds:
        run_federation(run)
    return run


def recipe_of(change: Change) -> Recipe:
    """The shipped private recipe on hutto's rows, changed."""
    values: Values = tomllib.loads(Path("recipes/private.toml").read_text())
    values["model"]["path"] = str(smollm2(MODEL).resolve())
    folder = data()
    values["trunk"] = {"device": DEVICE}
    for silo in values["silo"]:
        silo |= {key: str(folder / silo[key]) for key in ("train", "held_out")} | {"device": DEVICE}
    change(values)
    return Recipe.of(values)


def undefended(values: Values, noise: float = 0.0, cut: tuple[int, int] | None = None) -> None:
    """Plain split learning with this noise on hidden states."""
    values.pop("privacy", None)  # without a clip no budget can hold
    values["boundary"] = {path: {"noise": 0.0} for path in ("forward", "gradient", "update")}
    values["boundary"]["forward"]["noise"] = noise
    if cut is not None:
        values["model"] |= {"bottom": cut[0], "top": cut[1]}


def accuracy(run: RunDirectory) -> float:
    """On all silos' held-out rows after the last round."""
    lines = [
        line["accuracy"]
        for silo in run.recipe().silo
        for line in read_journal(run.role(silo.name).path / "metrics.jsonl")
        if line["event"] == "evaluation" and line["round"] == run.completed()
    ]
    return statistics.mean(lines)


def data() -> Path:
    """Both silos' rows, of all four kinds of text, and ``public.txt``: rows of these kinds that nobody trains on."""
    folder = CACHE.resolve()
    files = hutto(MODEL, rows=2 * ROWS + OTHERS, held_out=2 * HELD_OUT, seed=0)
    rows = {"east": ([], []), "west": ([], [])}  # type: ignore[var-annotated]
    others: list[str] = []
    for kind in files.values():
        train, held_out = kind.train.read_text().splitlines(), kind.held_out.read_text().splitlines()
        for number, (own, measured) in enumerate(rows.values()):
            own += train[number * ROWS :][:ROWS]
            measured += held_out[number * HELD_OUT :][:HELD_OUT]
        others += [" ".join(json.loads(line)["text"].split()) for line in train[2 * ROWS :]]
    for name, (own, measured) in rows.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_lines(folder / name / "train.jsonl", own)
        write_lines(folder / name / "held_out.jsonl", measured)
    write_lines(folder / "public.txt", others)
    return folder
