"""A finished run measured on rows: an answer to each of them by each silo's model, and the measures of all answers.

Where the run directory has baselines, they answer the same rows and are compared with the run, row by row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from isthmus.data.bad_rows import BadRows
from isthmus.data.encoding import TextEncoder
from isthmus.data.row_set import RowSet
from isthmus.data.silo_data import read_sets
from isthmus.data.templates import Example
from isthmus.data.tokens import Tokens
from isthmus.engines.answering import (
    AnsweringModel,
    PosedQuestion,
    Said,
    answer_groups,
    answerer_of,
    answering_task,
)
from isthmus.engines.baselines import BASELINES, UncutModel, trained_baseline
from isthmus.engines.chosen_round import chooses_best
from isthmus.engines.inference import connected_silo
from isthmus.errors import BudgetExhausted, DataError
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import Recipe
from isthmus.storage.files import writing
from isthmus.storage.record import RunDirectory
from isthmus.tasks.metrics import Answered, Score, confusion, difference, majority, measure
from isthmus.tasks.task import Item, Task

FEDERATED = "federated"


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
    model: str = FEDERATED
    """Whose answers: ``federated``, or a baseline, ``alone`` or ``pooled``."""
    answered: tuple[Answered | None, ...] = field(default=(), repr=False)
    """Each row's question and answer, None to one that could not be read."""


@dataclass(frozen=True)
class Contrast:
    """The run's model against a baseline, on the rows that both have answered."""

    silo: str
    """Empty: all silos' rows together."""
    baseline: str
    rows: int
    differences: dict[str, Score]
    """By measure: the run's value minus the baseline's, with the standard error of paired rows."""


def evaluate_run(
    run: RunDirectory,
    names: Sequence[str] = (),
    *,
    data: Sequence[str] = (),
    max_new_tokens: int | None = None,
    trunk: str | None = None,
    round: str | int | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> Iterator[SiloEvaluation]:
    """Measure the run's model as each of these silos, and the baselines of it that the run directory has.

    Rows are read, cut and tokenized as the recipe says, and what crosses is entered in the silo's ledger and charged.

    Args:
        names: silos; none: all in the run directory that have rows.
        data: files of rows in place of the silos' held-out rows.
        max_new_tokens: longest written answer, in tokens; None: as of ``answering_task``.
        trunk, round: as in ``opening.open_run``; of a baseline the same round, or its own best one.
        notify: called with messages.

    Raises:
        DataError: a row or file is unusable, or there are no rows.
        BudgetExhausted: no row's privacy budget allows reading it.
        RunError: a baseline was trained by another recipe, or not to the end.
    """
    recipe, measured = run.recipe(), _BaselineAnswers(run, round)
    if chooses_best(run, round) and not data:
        notify("the round was chosen by these held-out rows, on which it looks better than on others: see --data")
    here = run.silos()
    if not here and measured.any:  # the federation has not run here
        here = [silo.name for silo in recipe.silo]
    chosen = names or (here if data else [name for name in here if recipe.party(name).held_out])
    for name in chosen or here or [recipe.silo[0].name]:
        rows = None
        if run.silos() or not measured.any:
            with connected_silo(run, name, trunk=trunk, round=round, notify=notify) as (silo, _):
                answering = AnsweringModel(name, silo.model, silo.tokenizer, silo.boundary.limited)
                rows = _rows(recipe, answering, data, silo.boundary.records.sensitivity)
                if rows.note:
                    notify(f"{name} (train.max_tokens = {recipe.train.max_tokens}): {rows.note}")
                with silo.boundary.evaluating():
                    evaluated = _evaluated(recipe, answering, rows, max_new_tokens)
                yield evaluated
        for kind, answering in measured.models(name):
            rows = rows or _rows(recipe, answering, data)
            yield _evaluated(recipe, answering, rows, max_new_tokens, kind)


def compare(recipe: Recipe, evaluations: Sequence[SiloEvaluation]) -> list[Contrast]:
    """The run's answers against each baseline's, by silo, and where there are several, of all silos together."""
    task, found = answering_task(recipe), []
    silos = list(dict.fromkeys(one.silo for one in evaluations))
    models = {(one.silo, one.model): one.answered for one in evaluations}
    for baseline in dict.fromkeys(one.model for one in evaluations if one.model != FEDERATED):
        all_pairs: list[tuple[Answered, Answered]] = []
        both = [silo for silo in silos if (silo, FEDERATED) in models and (silo, baseline) in models]
        for silo in both:
            aligned = zip(models[silo, FEDERATED], models[silo, baseline], strict=True)
            pairs = [(one, other) for one, other in aligned if one is not None and other is not None]
            all_pairs += [(_of_silo(one, silo), _of_silo(other, silo)) for one, other in pairs]
            found.append(_compared(silo, baseline, task, pairs))
        if len(both) > 1:
            found.append(_compared("", baseline, task, all_pairs))
    return [one for one in found if one.rows]


def _compared(silo: str, baseline: str, task: Task, pairs: Sequence[tuple[Answered, Answered]]) -> Contrast:
    one, other = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    names = task.metrics if pairs else ()
    return Contrast(silo, baseline, len(pairs), {name: difference(name, one, other) for name in names})


def _of_silo(answered: Answered, silo: str) -> Answered:
    """An answer whose question is no other silo's, even if theirs has the same name."""
    item, given = answered
    return (replace(item, group=f"{silo}/{item.group}") if item.group else item), given


def write_predictions(path: Path, evaluations: Sequence[SiloEvaluation]) -> None:
    """Write a JSON object a row, readable by its owner alone: silo, model, place, the right and the given answer."""
    lines = [
        {"silo": one.silo, "model": one.model, "place": row.place, "right": row.right, "given": row.given}
        | ({"log_probs": row.log_probs} if row.log_probs else {})
        for one in evaluations
        for row in one.predictions
    ]
    with writing(path) as partial:
        partial.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")


class _BaselineAnswers:
    """The baselines in a run directory; the uncut model is loaded when one is asked for."""

    def __init__(self, run: RunDirectory, round: str | int | None) -> None:
        self._run, self._recipe, self._round = run, run.recipe(), round
        self._uncut: UncutModel | None = None
        pairs = [(kind, silo.name) for kind in BASELINES for silo in self._recipe.silo]
        self.any = any(trained_baseline(run, kind, name, round) is not None for kind, name in pairs)

    def models(self, name: str) -> Iterator[tuple[str, AnsweringModel]]:
        """The baselines of this silo, by kind."""
        for kind in BASELINES:
            tensors = trained_baseline(self._run, kind, name, self._round)
            if tensors is None:
                continue
            if self._uncut is None:
                self._uncut = UncutModel(self._recipe, self._recipe.party(name).device)
            self._uncut.load(tensors)
            yield kind, AnsweringModel(name, self._uncut.model, self._uncut.tokenizer)


def _rows(
    recipe: Recipe, answering: AnsweringModel, data: Sequence[str], sensitivity: Sensitivity | None = None
) -> RowSet:
    bad, name = BadRows(), answering.name
    section = recipe.party(name)
    if data:
        section = section.model_copy(update={"train": tuple(data), "held_out": ()})
    train, held_out = read_sets(section, recipe, answering.tokenizer, bad, sensitivity)
    bad.raise_any()
    rows = train if data else held_out
    if not rows.rows:
        raise DataError(
            f"{name} has no row in {', '.join(data)}" if data else f"{name} has no held-out rows",
            remedy="name a file with --data, or silo.held_out in the recipe",
        )
    rows.check_vocabulary(answering.model.config.vocab_size)
    return rows


def _evaluated(
    recipe: Recipe, answering: AnsweringModel, rows: RowSet, longest: int | None, model: str = FEDERATED
) -> SiloEvaluation:
    task = answering_task(recipe, longest)
    items = [_item(example, recipe) for _, example in rows.texts]
    said = _answers(answering, recipe, task, rows)
    aligned = tuple(None if one is None else (item, one.answer) for item, one in zip(items, said, strict=True))
    predictions = [
        Prediction(place, item.right[0], one.answer, one.log_probs)
        for (place, _), item, one in zip(rows.texts, items, said, strict=True)
        if one is not None
    ]
    if not predictions:
        raise BudgetExhausted(
            f"no row's privacy budget lets {answering.name} read it",
            remedy="raise privacy.record_epsilon in the recipe",
        )
    answered = [one for one in aligned if one is not None]
    return SiloEvaluation(
        answering.name,
        measure(task.metrics, answered),
        predictions,
        {} if task.longest else confusion(answered),
        None if task.longest else majority([one.right for one in predictions]),
        len(items) - len(predictions),
        model,
        aligned,
    )


def _answers(answering: AnsweringModel, recipe: Recipe, task: Task, rows: RowSet) -> list[Said | None]:
    """Answers to the rows in their order, to rows of similar length at a time; None to those that cannot be read."""
    encoder, answer = TextEncoder(answering.tokenizer), answerer_of(answering, recipe, task)
    questions = [
        PosedQuestion(row.prompt, example.choices, example.item.names if example.item else (), _ends(encoder, row))
        for row, (_, example) in zip(rows.rows, rows.texts, strict=True)
    ]
    said: dict[int, Said] = {}
    for numbers in answer_groups(answering, questions):
        with suppress(BudgetExhausted):  # under a budget the row is alone
            said.update(zip(numbers, answer([questions[number] for number in numbers]), strict=True))
    return [said.get(number) for number in range(len(questions))]


def _ends(encoder: TextEncoder, row: Tokens) -> tuple[int, ...]:
    """The control token at the end of a row's answer, if there is one."""
    return (row.answer[-1],) if row.answer and encoder.controls(row.answer[-1]) else ()


def _item(example: Example, recipe: Recipe) -> Item:
    """A row as a question with its right answers."""
    if example.item is not None:
        return example.item
    names = tuple(choice.strip() for choice in recipe.task.choices)
    return Item(example.prompt, example.answer, (example.answer.strip(),), recipe.task.continuations, names)
