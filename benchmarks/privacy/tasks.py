"""The tasks of the frontier: their rows, prompts and recipes; two silos share each.

A task's data lie in ``build/frontier/NAME``: ``west`` is the silo that colludes and gives training rows, ``east`` the
victim, of whose rows none was trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.results import DEVICE
from benchmarks.common.rows import SHARED, Rows, Values, read
from benchmarks.privacy import runs
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer

CACHE = Path("build/frontier")
LORA = {
    "rank": 8,
    "alpha": 16.0,
    "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
UNTRAINED = {"rank": 1, "alpha": 1.0, "targets": ["q_proj"]}
"""The smallest adapter that a recipe may have, for models whose weights themselves are tuned; it stays zero."""
SECTIONS = ("forward", "gradient", "update")


@dataclass(frozen=True)
class Task:
    """A task: its rows, its template, and the length of training."""

    name: str
    rows: Callable[[Path], tuple[Rows, Rows, Rows]]
    """From a model's folder to training, victim's and held-out rows."""
    template: Values
    """The recipe's section ``task``."""
    steps: int
    batch: int
    max_tokens: int
    learning_rate: float = 1e-3

    @property
    def generates(self) -> bool:
        return "choices" not in self.template

    def recipe(
        self,
        model: Path,
        cut: tuple[int, int] = (1, 1),
        boundary: Values | None = None,
        lora: Values | None = None,
    ) -> Recipe:
        """Of this model, cut there, with this boundary (nothing is clipped or noised by default) and adapter."""
        folder = self.data(model)
        return Recipe.of(
            {
                "model": {"path": str(model.resolve()), "bottom": cut[0], "top": cut[1]},
                "lora": lora or UNTRAINED,
                "train": {
                    "rounds": 1,
                    "steps": self.steps,
                    "batch": self.batch,
                    "learning_rate": self.learning_rate,
                    "max_tokens": self.max_tokens,
                    "evaluate": False,
                },
                "task": self.template,
                "boundary": {path: {"noise": 0.0} for path in SECTIONS} | (boundary or {}),
                "trunk": {"device": DEVICE},
                "silo": [
                    {
                        "name": name,
                        "train": str(folder / f"{name}.jsonl"),
                        "held_out": str(folder / "held_out.jsonl"),
                        "device": DEVICE,
                    }
                    for name in ("east", "west")
                ],
            }
        )

    def data(self, model: Path) -> Path:
        """The folder with the rows, written if it is not there."""
        folder = CACHE.resolve() / "rows" / self.name
        if not folder.exists():
            parts = dict(zip(("west", "east", "held_out"), self.rows(model), strict=True))
            folder.mkdir(parents=True)
            for name, rows in parts.items():
                lines = "".join(f"{json.dumps(row)}\n" for row in rows)
                (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        return folder


def hutto_rows(model: Path) -> tuple[Rows, Rows, Rows]:
    """Of both silos of ``benchmarks.privacy.runs``: training rows, and held-out rows in two halves."""
    folder = runs.CACHE if (runs.CACHE / "west" / "held_out.jsonl").exists() else runs.data()
    train = [row for silo in ("east", "west") for row in read(folder / silo / "train.jsonl")]
    return train, *halves(row for silo in ("east", "west") for row in read(folder / silo / "held_out.jsonl"))


def rte_rows(model: Path) -> tuple[Rows, Rows, Rows]:
    """SuperGLUE's RTE: premises of up to 600 characters; validation rows are held out, some training rows are the
    victim's."""
    train, held_out = (
        labelled(row for row in shuffled(SHARED / "superglue_rte" / f"{name}.jsonl") if fits(row))
        for name in ("train", "val")
    )
    return train[:1600], train[1600:1800], held_out


def labelled(rows: Iterable[Values]) -> Rows:
    """RTE's rows with the answers of its template."""
    return [{**row, "label": "yes" if row["label"] == "entailment" else "no"} for row in rows]


def dialogue_rows(model: Path) -> tuple[Rows, Rows, Rows]:
    """MTS-Dialog: those of at most 256 tokens a dialogue and 128 a note; the test sets are the victim's."""
    tokenizer = load_tokenizer(model)

    def short(row: Values) -> bool:
        sizes = [len(tokenizer(row[field])["input_ids"]) for field in ("dialogue", "section_text")]
        return 0 < sizes[0] <= 256 and 0 < sizes[1] <= 128

    train, victim, held_out = (
        [row for name in names for row in map(tidy, read(SHARED / "mts_dialog" / f"{name}.jsonl")) if short(row)]
        for names in (["train"], ["test1"], ["val"])
    )
    return train, victim, held_out


def shuffled(path: Path) -> Rows:
    rows = read(path)
    return random.Random(0).sample(rows, len(rows))


def halves(rows: Iterable[Values]) -> Iterator[Rows]:
    """Every other row, and those between them."""
    listed = list(rows)
    listed = random.Random(0).sample(listed, len(listed))
    yield listed[::2]
    yield listed[1::2]


def fits(row: Values) -> bool:
    return len(row["premise"]) + len(row["hypothesis"]) <= 600


def tidy(row: Values) -> Values:
    return {
        "section_header": row["section_header"],
        "dialogue": row["dialogue"].replace("\r\n", "\n").strip(),
        "section_text": f" {row['section_text'].strip()}",
    }


TASKS = {
    task.name: task
    for task in (
        Task(
            "hutto",
            hutto_rows,
            {
                "prompt": "{text}\nSentiment (positive or negative):",
                "answer": " {label}",
                "choices": [" positive", " negative"],
            },
            steps=40,
            batch=8,
            max_tokens=128,
        ),
        Task(
            "mts-dialog",
            dialogue_rows,
            {"prompt": "{dialogue}\n\nClinical note, section {section_header}:", "answer": "{section_text}"},
            steps=40,
            batch=2,
            max_tokens=512,
        ),
        Task(
            "rte",
            rte_rows,
            {
                "prompt": "{premise}\nDoes it follow that: {hypothesis}\nAnswer (yes or no):",
                "answer": " {label}",
                "choices": [" yes", " no"],
            },
            steps=60,
            batch=8,
            max_tokens=256,
        ),
    )
}
