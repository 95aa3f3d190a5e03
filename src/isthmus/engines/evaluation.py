"""A finished run measured on rows: an answer to each of them by each silo's model, and the measures of all answers."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from isthmus.data.bad_rows import BadRows
from isthmus.data.encoding import TextEncoder
from isthmus.data.row_set import RowSet
from isthmus.data.silo_data import padding, read_sets
from isthmus.data.templates import Example
from isthmus.data.tokens import Tokens, choice_tokens, collate
from isthmus.engines.inference import connected_silo, stop_tokens
from isthmus.errors import BudgetExhausted, DataError
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo
from isthmus.storage.record import RunDirectory, writing
from isthmus.tasks.catalogue import named_task
from isthmus.tasks.metrics import Score, confusion, majority, measure
from isthmus.tasks.scoring import ChoiceQuestion, best_choices, choice_log_probs
from isthmus.tasks.task import Item, Task

CHOSEN = ("accuracy", "macro_f1")
WRITTEN = ("token_f1", "exact_match")
ROUGE = ("rouge1", "rouge2", "rougeL")
TOGETHER = 16
"""Rows that are answered at a time."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's answer to one row."""

    place: str
    right: str
    given: str
    log_probs: dict[str, float] = field(default_factory=dict)
    """Of each choice, in nats; empty where answers are written."""


@dataclass(frozen=True)
class SiloEvaluation:
    """What one silo's model answered."""

    silo: str
    scores: dict[str, Score]
    """By measure."""
    predictions: list[Prediction]
    confusion: dict[tuple[str, str], int]
    """Number of rows by right and given choice; empty where answers are written."""
    majority: float | None
    """Accuracy of always giving the most common right choice; None where answers are written."""
    skipped: int
    """Rows that their privacy budgets did not allow to be read."""


def evaluate_run(
    run: RunDirectory,
    names: Sequence[str] = (),
    *,
    data: Sequence[str] = (),
    max_new_tokens: int = 64,
    trunk: str | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> Iterator[SiloEvaluation]:
    """Measure the run's model as each of these silos.

    Rows are read, cut and tokenized as the recipe says, and what crosses is entered in the silo's ledger and charged.

    Args:
        names: silos; none: all in the run directory that have rows.
        data: files of rows in place of the silos' held-out rows.
        max_new_tokens: longest written answer, in tokens.
        trunk: as in ``opening.open_run``.
        notify: called with messages.

    Raises:
        DataError: a row or file is unusable, or there are no rows.
        BudgetExhausted: no row's privacy budget allows reading it.
    """
    recipe = run.recipe()
    chosen = names or (run.silos() if data else [name for name in run.silos() if recipe.party(name).held_out])
    for name in chosen or run.silos():
        with connected_silo(run, name, trunk=trunk, notify=notify) as (silo, _):
            rows = _rows(recipe, name, silo, data)
            if rows.note:
                notify(f"{name} (train.max_tokens = {recipe.train.max_tokens}): {rows.note}")
            yield _evaluated(recipe, silo, rows, max_new_tokens)


def write_predictions(path: Path, evaluations: Sequence[SiloEvaluation]) -> None:
    """Write a JSON object a row, readable by its owner alone: silo, place, the right and the given answer."""
    lines = [
        {"silo": one.silo, "place": row.place, "right": row.right, "given": row.given}
        | ({"log_probs": row.log_probs} if row.log_probs else {})
        for one in evaluations
        for row in one.predictions
    ]
    with writing(path) as partial:
        partial.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")


def _rows(recipe: Recipe, name: str, silo: Silo, data: Sequence[str]) -> RowSet:
    bad, section = BadRows(), recipe.party(name)
    if data:
        section = section.model_copy(update={"train": tuple(data), "held_out": ()})
    train, held_out = read_sets(section, recipe, silo.tokenizer, bad, silo.boundary.records.sensitivity)
    bad.raise_any()
    rows = train if data else held_out
    if not rows.rows:
        raise DataError(
            f"{name} has no row in {', '.join(data)}" if data else f"{name} has no held-out rows",
            remedy="name a file with --data, or silo.held_out in the recipe",
        )
    rows.check_vocabulary(silo.model.config.vocab_size)
    return rows


def _evaluated(recipe: Recipe, silo: Silo, rows: RowSet, longest: int) -> SiloEvaluation:
    task = _task(recipe, longest)
    answer = _Writer(silo, task) if task.longest else _Chooser(silo, recipe, task)
    asked = [(place, row, _item(example, recipe)) for row, (place, example) in zip(rows.rows, rows.texts, strict=True)]
    answered: list[tuple[Item, str]] = []
    predictions: list[Prediction] = []
    for start in range(0, len(asked), TOGETHER):
        some = asked[start : start + TOGETHER]
        given = _affordable(answer, [(row, item) for _, row, item in some])
        for (place, _, item), said in zip(some, given, strict=True):
            if said is not None:
                answered.append((item, said[0]))
                predictions.append(Prediction(place, item.right[0], *said))
    if not predictions:
        raise BudgetExhausted(
            f"no row's privacy budget lets {silo.name} read it", remedy="raise privacy.record_epsilon in the recipe"
        )
    return SiloEvaluation(
        silo.name,
        measure(task.metrics, answered),
        predictions,
        {} if task.longest else confusion(answered),
        None if task.longest else majority([one.right for one in predictions]),
        len(asked) - len(predictions),
    )


def _task(recipe: Recipe, longest: int) -> Task:
    """The recipe's task, known or its own, for which answers are written with at most so many tokens."""
    rouge = importlib.util.find_spec("rouge_score") is not None
    if not recipe.task.name:
        if recipe.task.choices:
            return Task("", lambda _: [], CHOSEN)
        return Task("", lambda _: [], (*WRITTEN, *(ROUGE if rouge else ())), longest=longest)
    task = named_task(recipe.task.name)
    known = tuple(name for name in task.metrics if rouge or name not in ROUGE)
    return replace(task, metrics=known or WRITTEN)


def _item(example: Example, recipe: Recipe) -> Item:
    """A row as a question with its right answers."""
    if example.item is not None:
        return example.item
    names = tuple(choice.strip() for choice in recipe.task.choices)
    return Item(example.prompt, example.answer, (example.answer.strip(),), recipe.task.continuations, names)


PosedRow = tuple[Tokens, Item]
"""A row, and its question."""
Said = tuple[str, dict[str, float]]
"""An answer, and the log-probability of each choice."""


def _affordable(answer: Callable[[list[PosedRow]], list[Said]], rows: list[PosedRow]) -> list[Said | None]:
    """Answers to the rows; None to those whose privacy budgets do not allow it."""
    try:
        return list(answer(rows))
    except BudgetExhausted as error:
        if len(rows) == 1:
            log.debug("a row is skipped: %s", error.message)
            return [None]
        half = len(rows) // 2
        return _affordable(answer, rows[:half]) + _affordable(answer, rows[half:])


class _Chooser:
    """Gives the likeliest choice of each row, ranked as the task says."""

    def __init__(self, silo: Silo, recipe: Recipe, task: Task) -> None:
        self._model, self._tokenizer, self._ranking = silo.model, silo.tokenizer, task.ranking
        self._pad = padding(silo.tokenizer)
        self._choices = [tuple(ids) for ids in choice_tokens(silo.tokenizer, recipe.task.continuations)]

    def __call__(self, rows: list[PosedRow]) -> list[Said]:
        asked = [ChoiceQuestion(row.prompt, list(map(list, row.choices or self._choices))) for row, _ in rows]
        found = choice_log_probs(self._model, asked, pad=self._pad)
        alone: list[list[float]] = []
        if self._ranking == "unconditioned":
            nothing = Tokens([self._beginning()], [])
            alone = choice_log_probs(
                self._model, [ChoiceQuestion(nothing.prompt, one.choices) for one in asked], pad=self._pad
            )
        best = best_choices(found, [item.choices for _, item in rows], self._ranking, alone)
        return [
            (item.names[number], dict(zip(item.names, scores, strict=True)))
            for (_, item), number, scores in zip(rows, best, found, strict=True)
        ]

    def _beginning(self) -> int:
        """The token before what follows nothing, as lm-eval's harness chooses it."""
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        return begin if begin is not None else end if end is not None else self._pad


class _Writer:
    """Writes an answer to each row, the likeliest token at each step, up to where the task stops."""

    def __init__(self, silo: Silo, task: Task) -> None:
        self._silo, self._model, self._tokenizer, self._task = silo, silo.model, silo.tokenizer, task
        self._encoder = TextEncoder(silo.tokenizer)

    @torch.no_grad()
    def __call__(self, rows: list[PosedRow]) -> list[Said]:
        batch = collate([Tokens(row.prompt, []) for row, _ in rows], padding(self._tokenizer)).to(self._model.device)
        written = self._model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=self._task.longest,
            do_sample=False,
            pad_token_id=padding(self._tokenizer),
            eos_token_id=stop_tokens(self._silo, filter(self._encoder.controls, (row.answer[-1] for row, _ in rows))),
        )
        texts = self._tokenizer.batch_decode(written[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        return [(self._stopped(text), {}) for text in texts]

    def _stopped(self, text: str) -> str:
        text = text.lstrip()  # a model may begin with what would stop it
        ends = [at for stop in self._task.stop if (at := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))].strip()
