"""Answers of a run's model to questions: the likeliest choice, or what it writes, as the recipe's task says."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from isthmus.data.silo_data import padding
from isthmus.data.tokens import choice_tokens
from isthmus.engines.inference import WRITTEN_TOKENS, stop_tokens
from isthmus.recipe import Recipe
from isthmus.tasks.catalogue import named_task
from isthmus.tasks.greedy import write_answers
from isthmus.tasks.scoring import ChoiceQuestion, best_choices, choice_log_probs
from isthmus.tasks.task import Task

CHOSEN = ("accuracy", "macro_f1")
WRITTEN = ("token_f1", "exact_match")
ROUGE_SCORES = ("rouge1", "rouge2", "rougeL")
TOGETHER = 16
"""Questions that are answered at a time."""


@dataclass(frozen=True)
class AnsweringModel:
    """What answers: a silo's split model, or an uncut one."""

    name: str
    """The silo's."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    limited: bool = False
    """Whether a privacy budget limits what it reads."""


@dataclass(frozen=True, slots=True)
class PosedQuestion:
    """What is asked, in tokens."""

    prompt: list[int]
    choices: tuple[str, ...] = ()
    """The question's own possible answers, as the model would write them; empty: the task's, or it writes freely."""
    names: tuple[str, ...] = ()
    """What each choice stands for."""
    ends: tuple[int, ...] = ()
    """Tokens that end a written answer, besides those of the model's generation settings."""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer."""

    answer: str
    """The chosen choice's name, or the written text."""
    finish: str
    """``choice``, ``stop``, or ``length`` where a written answer was cut off."""
    log_probs: dict[str, float] = field(default_factory=dict)
    """Of each choice, in nats; empty where answers are written."""


Answerer = Callable[[Sequence[PosedQuestion]], list[Said]]
"""Answers questions, as many as ``TOGETHER``, in their order."""


def answering_task(recipe: Recipe, longest: int | None = None) -> Task:
    """The recipe's task, known or its own.

    Args:
        longest: most tokens of a written answer; None: as a known task says, else ``WRITTEN_TOKENS``.
    """
    rouge = importlib.util.find_spec("rouge_score") is not None
    if not recipe.task.name:
        if recipe.task.choices:
            return Task("", lambda _: [], CHOSEN)
        return Task("", lambda _: [], (*WRITTEN, *(ROUGE_SCORES if rouge else ())), longest=longest or WRITTEN_TOKENS)
    task = named_task(recipe.task.name)
    known = tuple(name for name in task.metrics if rouge or name not in ROUGE_SCORES)
    return replace(task, metrics=known or WRITTEN, longest=(longest or task.longest) if task.longest else 0)


def answerer_of(answering: AnsweringModel, recipe: Recipe, task: Task) -> Answerer:
    """What answers questions of this task."""
    return _Writer(answering, task) if task.longest else _Chooser(answering, recipe, task)


def answer_groups(answering: AnsweringModel, questions: Sequence[PosedQuestion]) -> list[list[int]]:
    """Numbers of the questions that are answered together: of similar length, the longest first.

    Under a privacy budget each is answered by itself, in their order: where the budget ends within a group, all that
    was paid for its answers so far would be lost.
    """
    if answering.limited:
        return [[number] for number in range(len(questions))]
    order = sorted(range(len(questions)), key=lambda number: -len(questions[number].prompt))
    return [order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)]


class _Chooser:
    """Gives the likeliest choice of each question, ranked as the task says."""

    def __init__(self, answering: AnsweringModel, recipe: Recipe, task: Task) -> None:
        self._model, self._tokenizer, self._ranking = answering.model, answering.tokenizer, task.ranking
        self._pad = padding(answering.tokenizer)
        self._choices, self._known = recipe.task.continuations, dict[tuple[str, ...], list[list[int]]]()
        self._names = tuple(choice.strip() for choice in recipe.task.choices)

    def __call__(self, questions: Sequence[PosedQuestion]) -> list[Said]:
        texts = [one.choices or self._choices for one in questions]
        asked = [ChoiceQuestion(one.prompt, self._tokens(own)) for one, own in zip(questions, texts, strict=True)]
        found = choice_log_probs(self._model, asked, pad=self._pad)
        alone: list[list[float]] = []
        if self._ranking == "unconditioned":
            nothing = [ChoiceQuestion([self._beginning()], one.choices) for one in asked]
            alone = choice_log_probs(self._model, nothing, pad=self._pad)
        best = best_choices(found, texts, self._ranking, alone)
        named = [one.names or self._names for one in questions]
        return [
            Said(names[number], "choice", dict(zip(names, scores, strict=True)))
            for names, number, scores in zip(named, best, found, strict=True)
        ]

    def _tokens(self, choices: tuple[str, ...]) -> list[list[int]]:
        if choices not in self._known:
            self._known[choices] = choice_tokens(self._tokenizer, choices)
        return self._known[choices]

    def _beginning(self) -> int:
        """The token before what follows nothing, as lm-eval's harness chooses it."""
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        return begin if begin is not None else end if end is not None else self._pad


class _Writer:
    """Writes an answer to each question, the likeliest token at each step, up to where the task stops."""

    def __init__(self, answering: AnsweringModel, task: Task) -> None:
        self._model, self._tokenizer, self._task = answering.model, answering.tokenizer, task

    def __call__(self, questions: Sequence[PosedQuestion]) -> list[Said]:
        written = write_answers(
            self._model,
            [one.prompt for one in questions],
            self._decode,
            longest=self._task.longest,
            ends=stop_tokens(self._model, {end for one in questions for end in one.ends}) or (),
            stop=self._task.stop,
            pad=padding(self._tokenizer),
        )
        return [Said(one.text, "stop" if one.stopped else "length") for one in written]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
