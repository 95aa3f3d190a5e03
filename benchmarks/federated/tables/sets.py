"""Rows of the public sets: what trains in which silo, what settings are chosen on, and what is reported.

The three are disjoint, and no text that is reported is trained on. Seeds draw other training rows and deal them anew;
rows to choose by and to report stay the same. Rows of more characters than a table can afford are left out, whatever
their label.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from benchmarks.common.rows import SHARED, Rows, Values, read
from isthmus.tasks.catalogue import named_task
from isthmus.tasks.task import Item

SILOS = ("first", "second", "third")
STEPS, LONGER = 16, 3
"""Steps of each arm unless a source says others, and how many times as many its long form has."""
TWO_CLASSES = ((0.6, 0.1, 0.3), (0.1, 0.6, 0.3))
MOSTLY, OTHERS = 0.7, 0.15
"""Share of a class's rows that its own silo has, and each other one."""
BANKING = """transfer transactions balance freeze_account pay_bill bill_balance bill_due interest_rate routing
min_payment order_checks pin_change report_fraud account_blocked spending_history"""
INTENTS = tuple(BANKING.split())


@dataclass(frozen=True)
class Sample:
    """Rows of one draw."""

    train: Mapping[str, Rows]
    """By silo."""
    validation: Rows
    reported: Rows


@dataclass(frozen=True)
class Source:
    """A public set as a table uses it."""

    task: Values
    """The recipe's section, but for choices that rows say."""
    train_files: tuple[str, ...]
    unseen_files: tuple[str, ...]
    train: int = 96
    """Most training rows, of all silos."""
    validation: int = 32
    reported: int = 128
    """Most rows that are reported."""
    validate_unseen: bool = False
    """Take validation rows from the unseen files, where the training files have few."""
    natural: str = ""
    """The field whose values are dealt whole to silos; empty: silos differ in their mixture of classes."""
    group: str = ""
    """The field that rows of one text have in common, so that it is on one side alone; empty: each is one by itself."""
    most: int = 600
    """Characters of a prompt with its longest answer."""
    prepared: Callable[[Rows], Rows] = list
    choices: str = ""
    """The field whose values in the training files are the choices; empty: the task says them."""
    steps: int = STEPS
    """Of each arm."""

    @cached_property
    def section(self) -> Values:
        """The recipe's section of the task."""
        if not self.choices:
            return self.task
        values = {row[self.choices] for file in self.train_files for row in read(SHARED / file)}
        return {**self.task, "choices": [f" {value}" for value in sorted(values)]}

    def sample(self, seed: int) -> Sample:
        """One draw of training rows; the other rows are the same for each seed."""
        known, unseen = (self._rows(files) for files in (self.train_files, self.unseen_files))
        reported, spare = unseen[: self.reported], unseen[self.reported :]
        known, spare = self._apart(known, reported), self._apart(spare, reported)
        validation = (spare if self.validate_unseen else known)[: self.validation]
        known = self._apart(known, validation)
        drawn = random.Random(f"train/{seed}").sample(known, min(self.train, len(known)))
        return Sample(self._dealt(drawn), validation, reported)

    def _apart(self, rows: Rows, others: Rows) -> Rows:
        """Those that have neither text nor group in common with the others."""
        taken = {self._mark(row) for row in others}
        return [row for row in rows if self._mark(row) not in taken]

    def _mark(self, row: Values) -> str:
        return str(row[self.group]) if self.group else self._text(row)

    def _rows(self, files: tuple[str, ...]) -> Rows:
        """All rows that are short enough, in an order of their own, each text once."""
        rows = self.prepared([row for file in files for row in read(SHARED / file)])
        once = {self._text(row): row for row in rows if self._length(row) <= self.most}
        ordered = list(once.values())
        return random.Random("order").sample(ordered, len(ordered))

    def _dealt(self, rows: Rows) -> Mapping[str, Rows]:
        if self.natural:
            return whole(rows, self.natural)
        return skewed(rows, [self._items(row)[0].right[0] for row in rows])

    def _items(self, row: Values) -> list[Item]:
        if "name" in self.task:
            return named_task(self.task["name"]).items(row)
        prompt, answer = (self.task[key].format(**row) for key in ("prompt", "answer"))
        return [Item(prompt, answer, (answer.strip(),), tuple(self.section["choices"]))]

    def _text(self, row: Values) -> str:
        return self._items(row)[0].prompt

    def _length(self, row: Values) -> int:
        return max(len(one.prompt) + max(map(len, (one.answer, *one.choices))) for one in self._items(row))


def skewed(rows: Rows, classes: list[str]) -> dict[str, Rows]:
    """Each class mostly in one silo; of two classes, the third silo has both alike."""
    silos: dict[str, Rows] = {name: [] for name in SILOS}
    names = sorted(set(classes))
    for number, name in enumerate(names):
        own = [row for row, one in zip(rows, classes, strict=True) if one == name]
        rotated = [MOSTLY if silo == number % len(SILOS) else OTHERS for silo in range(len(SILOS))]
        shares = TWO_CLASSES[number] if len(names) == 2 else rotated
        start, passed = 0, 0.0
        for silo, share in zip(SILOS, shares, strict=True):
            passed += share
            end = round(passed * len(own))
            silos[silo] += own[start:end]
            start = end
    return silos


def whole(rows: Rows, field: str) -> dict[str, Rows]:
    """All rows of a value go to one silo: to the one with fewest rows so far, the most frequent value first."""
    silos: dict[str, Rows] = {name: [] for name in SILOS}
    by_value: defaultdict[str, Rows] = defaultdict(list)
    for row in rows:
        by_value[row[field]].append(row)
    for value, _ in Counter(row[field] for row in rows).most_common():
        silos[min(SILOS, key=lambda name: len(silos[name]))] += by_value[value]
    return silos


def clear(rows: Rows) -> Rows:
    """Texts with a sentiment that is plain, of three kinds."""
    return [row for row in rows if abs(row["score"]) > 1.0 and row["domain"] in ("movies", "tweets", "amazon")]


def banking(rows: Rows) -> Rows:
    return [row for row in rows if row["intent"] in INTENTS]


def answers(rows: Rows) -> Rows:
    """MultiRC's questions, a row for each answer."""
    return list(single_answers(rows))


def single_answers(rows: Rows) -> Iterator[Values]:
    for number, row in enumerate(rows):
        for one in row["passage"]["questions"]:
            for answer in one["answers"]:
                if answer["text"]:
                    yield {
                        "paragraph": row["passage"]["text"],
                        "question": one["question"],
                        "answer": answer["text"],
                        "label": answer["label"],
                        "idx": {"paragraph": number, "question": one["idx"]},
                    }


def few(name: str, **more: Any) -> Source:
    """A SuperGLUE task of which there are 64 rows to learn from."""
    folder = f"superglue_{name}"
    return Source(
        {"name": name}, (f"{folder}/train32.jsonl", f"{folder}/dev32.jsonl"), (f"{folder}/val.jsonl",), **more
    )


TASKS = {
    "hutto": Source(
        {"name": "sentiment"},
        ("hutto_sentiment/all.jsonl",),
        ("hutto_sentiment/all.jsonl",),
        most=160,
        natural="domain",
        prepared=clear,
    ),
    "clinc150": Source(
        {"prompt": "{text}\nIntent:", "answer": " {intent}", "choices": [f" {one}" for one in INTENTS]},
        ("clinc150/train.jsonl",),
        ("clinc150/test.jsonl",),
        most=300,
        prepared=banking,
    ),
    "clinc150_all": Source(
        {"prompt": "{text}\nIntent:", "answer": " {intent}"},
        ("clinc150/train.jsonl",),
        ("clinc150/test.jsonl",),
        train=900,
        most=300,
        choices="intent",
        steps=150,
    ),
    "copa": few("copa", validation=16),
    "wic": few("wic", validate_unseen=True),
    "cb": few("cb", validation=16),
    "rte": Source({"name": "rte"}, ("superglue_rte/train.jsonl",), ("superglue_rte/val.jsonl",), most=400),
    "wsc": few("wsc", validation=16),
    "boolq": few("boolq", validate_unseen=True, most=800),
    "multirc": Source(
        {"name": "multirc"},
        ("superglue_multirc/train.jsonl",),
        ("superglue_multirc/val.jsonl",),
        most=1200,
        prepared=answers,
        reported=96,
    ),
    "record": Source(
        {"name": "record"},
        ("superglue_record/train32.jsonl",),
        ("superglue_record/dev32.jsonl",),
        most=2000,
        validation=8,
        reported=32,
        natural="idx",
    ),
    "scitldr": Source(
        {"name": "scitldr", "truncate": "middle"},
        ("scitldr_a/train.jsonl",),
        ("scitldr_a/test.jsonl",),
        most=1000,
        validation=24,
        reported=48,
        natural="paper_id",
    ),
    "mts_dialog": Source(
        {"name": "mts_dialog", "truncate": "middle"},
        ("mts_dialog/train.jsonl",),
        ("mts_dialog/test1.jsonl",),
        most=800,
        validation=24,
        reported=48,
        natural="section_header",
    ),
    "canard": Source(
        {"name": "canard"},
        ("canard/dev_qa_turns.jsonl",),
        ("canard/dev_qa_turns.jsonl",),
        most=700,
        validation=24,
        reported=64,
        natural="dialog_id",
        group="dialog_id",
    ),
    "xsum": Source(
        {"name": "xsum", "truncate": "middle"},
        ("xsum/train200.jsonl",),
        ("xsum/train200.jsonl",),
        most=2000,
        validation=16,
        reported=32,
        natural="document",
    ),
}
LONG = {
    f"{name}_long": replace(source, steps=LONGER * STEPS) for name, source in TASKS.items() if source.steps == STEPS
}
"""The same rows, read three times."""
SOURCES = {**TASKS, **LONG}
