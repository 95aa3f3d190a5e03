"""Data of the simulated federations: real text in silos that differ, written as rows for their recipes.

*speakers*: Shakespeare's characters, each a silo, from many lines to few (stories260k). *topics*: CLINC150's requests,
each silo with topics of its own mixture (stories260k, tuned on a few rows first). *opinions*: hutto's four kinds of
text (SmolLM2).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common.rows import SHARED, Rows, Values, read, write_lines
from benchmarks.federated.pretuned import LETTERS, PROMPT, TOPICS, labelled, pretuned
from benchmarks.federated.simulation import merged, recipe_of
from isthmus.demo.assets import hutto, smollm2
from isthmus.recipe import Recipe

STORIES = Path(os.environ.get("ISTHMUS_MODELS", "../shared/models")) / "stories260k"
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPEAKERS = (0, 1, 2, 4, 8, 14, 22, 40, 60, 90)
"""Places, by how much they say, of the silos among all speakers."""
CHARACTERS, LEAST = 90, 30
"""Of a row of a speaker's lines."""
VALIDATION = 6
"""One training row of a silo in so many is a validation row, on which settings are chosen."""

Files = Mapping[str, Mapping[str, Path]]


@dataclass(frozen=True)
class Corpus:
    """A model, a task and how its rows come to silos."""

    model: Callable[[], Path]
    files: Callable[[Path, int], Files]
    """Writes them into a folder, for so many silos."""
    sections: Values
    """Of the recipe."""

    def recipe(self, folder: Path, changes: Values, *, silos: int = 10, seed: int = 0, device: str = "cpu") -> Recipe:
        """With this corpus's rows, written into the folder.

        Args:
            seed: of the order of rows and of the adapters' first values; the rows are the same.
        """
        values = merged(self.sections, changes) | {"seed": seed}
        return recipe_of(self.model(), self.files(folder, silos), values, device)


def speakers(folder: Path, silos: int) -> Files:
    """A speaker's lines in pieces; every twelfth piece is held out. Many silos are those who say most."""
    spoken = sorted(
        read(SHARED / "tinyshakespeare" / "by_speaker.jsonl"), key=lambda one: -sum(map(len, one["utterances"]))
    )
    rows = {}
    for place in SPEAKERS[:silos] if silos <= len(SPEAKERS) else range(silos):
        name = spoken[place]["client"].lower()
        texts = [text for utterance in spoken[place]["utterances"] for text in pieces(utterance)]
        rows[name.replace(" ", "-")] = [{"name": name, "text": text} for text in texts]
    return written(folder, {name: (every(one, 12, False), every(one, 12, True)) for name, one in rows.items()})


def mixed(folder: Path, silos: int) -> Files:
    """Speakers, and last of all a silo of news, whose language is nobody else's."""
    texts = [piece for row in read(SHARED / "agnews" / "dev.jsonl")[:400] for piece in pieces(row["text"])[:1]]
    news = [{"name": "news", "text": text} for text in texts]
    own = written(folder, {"news": (every(news, 12, False), every(news, 12, True))})
    return {**speakers(folder, silos - 1), **own}


def pieces(utterance: str) -> list[str]:
    """Whole lines, as many as fit."""
    found = [""]
    for line in utterance.split("\n"):
        if found[-1] and len(found[-1]) + len(line) >= CHARACTERS:
            found.append("")
        found[-1] = f"{found[-1]}\n{line}".strip()
    return [piece[:CHARACTERS] for piece in found if len(piece) >= LEAST]


def topics(folder: Path, silos: int, concentration: float = 0.5, rows: int = 3000) -> Files:
    """Requests by topic, of which each silo has a mixture of its own (Dirichlet), and as many as any other; held-out
    rows are of the same mixture."""
    draw = random.Random(0)
    pools = {split: by_topic(split, draw) for split in ("train", "test")}
    mixtures = {f"silo-{number:03d}": mixture(draw, concentration) for number in range(silos)}
    sizes = {"train": max(1, rows // silos), "test": max(1, 1200 // silos)}
    return written(
        folder,
        {
            name: tuple(dealt(draw, pools[split], shares, sizes[split]) for split in ("train", "test"))
            for name, shares in mixtures.items()
        },
    )


def by_topic(split: str, draw: random.Random) -> dict[str, Rows]:
    """Shuffled rows of each topic."""
    rows = labelled(split)
    pool = {topic: [row for row in rows if row["domain"] == topic] for topic in TOPICS}
    return {topic: draw.sample(some, len(some)) for topic, some in pool.items()}


def mixture(draw: random.Random, concentration: float) -> list[float]:
    """Shares of the topics."""
    parts = [draw.gammavariate(concentration, 1) + 1e-9 for _ in TOPICS]
    return [part / sum(parts) for part in parts]


def dealt(draw: random.Random, pool: Mapping[str, Rows], shares: Sequence[float], count: int) -> Rows:
    """So many rows of this mixture, taken out of the pool; of another topic where one is used up."""
    taken: Rows = []
    for topic in draw.choices(TOPICS, shares, k=count):
        left = pool[topic] or max(pool.values(), key=len)
        taken.append(left.pop())
    return taken


def opinions(folder: Path, silos: int) -> Files:
    """Hutto's four kinds of text, of which there are as many silos."""
    found = hutto(Path("build/demo"), rows=250, held_out=40, seed=0)
    return {name: {"train": one.train.resolve(), "held_out": one.held_out.resolve()} for name, one in found.items()}


def with_validation(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """The corpus to choose settings on, and the one to report: their silos train on the same rows.

    Every sixth of a silo's training rows is taken out of training. The first corpus holds these rows out, the second
    the rows that the corpus held out before.
    """

    def choosing(folder: Path, silos: int) -> Files:
        return {
            name: {"train": train, "held_out": validation}
            for name, (train, validation, _) in three_ways(corpus, folder, silos).items()
        }

    def reporting(folder: Path, silos: int) -> Files:
        return {
            name: {"train": train, "held_out": held_out}
            for name, (train, _, held_out) in three_ways(corpus, folder, silos).items()
        }

    return replace(corpus, files=choosing), replace(corpus, files=reporting)


def three_ways(corpus: Corpus, folder: Path, silos: int) -> dict[str, tuple[Path, Path, Path]]:
    """Files of training, validation and held-out rows of each silo."""
    found = {}
    for name, files in corpus.files(folder, silos).items():
        rows = read(files["train"])
        train, validation = (
            rows_file(folder / f"{name}-{kind}.jsonl", every(rows, VALIDATION, chosen))
            for kind, chosen in (("less-validation", False), ("validation", True))
        )
        found[name] = train, validation, files["held_out"]
    return found


def written(folder: Path, rows: Mapping[str, tuple[Rows, ...]]) -> Files:
    """Training and held-out rows of each silo, as files in this folder."""
    keys = ("train", "held_out")
    return {
        name: {key: rows_file(folder / f"{name}-{key}.jsonl", one) for key, one in zip(keys, both, strict=True)}
        for name, both in rows.items()
    }


def rows_file(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [json.dumps(row) for row in rows])
    return path


def every(rows: Rows, step: int, chosen: bool) -> Rows:
    """Every ``step``-th row, from the first one on, or all others."""
    return [row for number, row in enumerate(rows) if (number % step == 0) == chosen]


SPEAKING = Corpus(
    lambda: STORIES,
    speakers,
    {
        "task": {"prompt": "{name}:\n", "answer": "{text}"},
        "model": {"bottom": 1, "top": 3},
        "lora": {"rank": 16, "alpha": 32.0, "targets": TARGETS},
        "train": {"max_tokens": 96, "batch": 4},
    },
)
ROUTING = Corpus(
    lambda: pretuned(STORIES),
    topics,
    {
        "model": {"bottom": 1, "top": 3},
        "task": {"prompt": PROMPT, "answer": "{label}", "choices": list(LETTERS)},
        "lora": {"rank": 16, "alpha": 32.0, "targets": ALL_TARGETS},
        "train": {"max_tokens": 96, "batch": 8},
    },
)
OPINING = Corpus(
    lambda: smollm2(Path("build/demo")),
    opinions,
    {
        "task": {
            "prompt": "{text}\nSentiment (positive or negative):",
            "answer": " {label}",
            "choices": [" positive", " negative"],
        },
        "model": {"bottom": 1, "top": 12},
        "lora": {"rank": 16, "alpha": 32.0, "targets": TARGETS},
        "train": {"max_tokens": 96, "batch": 2},
    },
)
