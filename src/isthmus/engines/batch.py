"""A file of rows answered by a run's model: an answer a line, in the rows' order, by as many calls as it takes.

Rows are read one window at a time, and the answers to a window's first rows are on the disk before those to later ones.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

from transformers import AutoConfig, PreTrainedTokenizerBase

from isthmus.data.bad_rows import BadRows
from isthmus.data.conversations import asked_example
from isthmus.data.formats import jsonl_row
from isthmus.data.known_task import asked_questions
from isthmus.data.sources import SourceRow
from isthmus.data.templates import Example
from isthmus.data.tokens import ending_tokens, prompt_tokens
from isthmus.engines.answering import (
    TOGETHER,
    Answerer,
    AnsweringModel,
    PosedQuestion,
    Said,
    answer_groups,
    answerer_of,
    answering_task,
)
from isthmus.engines.inference import connected_silo
from isthmus.errors import BudgetExhausted, DataError, RunError
from isthmus.recipe import Recipe, SiloSection
from isthmus.silo.join import load_tokenizer
from isthmus.storage.files import PRIVATE, disk_errors, private_folder
from isthmus.storage.record import RunDirectory

IN_MEMORY = 8 * TOGETHER
"""Questions that are in memory at a time, and answered in groups of similar length."""
BOM = b"\xef\xbb\xbf"
MadeBy = tuple[str, int]
"""The silo that answered, and the round of its model."""


@dataclass(frozen=True, slots=True)
class Posed:
    """One question of a file of rows."""

    place: str
    row: int
    """Line of its row."""
    number: int
    """Of several questions of a row, from 1."""
    fields: dict[str, Any]
    """The row, as it stands in the file."""
    question: PosedQuestion

    def line(self, by: MadeBy) -> dict[str, Any]:
        """What the answer's line says of the question."""
        return {"row": self.row, "question": self.number, "silo": by[0], "round": by[1], "input": self.fields}


def answer_file(
    run: RunDirectory,
    source: Path,
    out: Path,
    name: str | None = None,
    *,
    max_new_tokens: int | None = None,
    trunk: str | None = None,
    round: str | int | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> int:
    """Answer the rows of a JSONL file in the recipe's template, as ``inference.generate_text`` answers one.

    All rows are checked before any is sent. Each answer is a line of ``out``: a JSON object with ``row`` (the line),
    ``question`` (of several of a row, from 1), ``silo``, ``round``, ``input`` (the row), ``answer``, ``finish``
    (``choice``, ``stop``, ``length``) and, of choices, ``log_probs`` in nats. If ``out`` has answers to the first rows
    already, by the same silo and round, the others are appended; a line that was cut off is written again.

    Args:
        source: rows as of ``silo.train``, but for their answers; may be a gzip file.
        name, trunk, round: as in ``opening.open_run``.
        max_new_tokens: longest written answer, in tokens; None: as of ``answering_task``.
        notify: called with messages of progress.

    Returns:
        The number of answers in ``out``.

    Raises:
        DataError: rows cannot be used, all of them counted, or the answers in ``out`` are not to these rows, or not by
            this silo and round.
        BudgetExhausted: a privacy budget does not allow reading the next row. The answers before it are in ``out``.
        RunError, DiskFullError: ``out`` cannot be written, or another process writes it.
    """
    recipe = run.recipe()
    section = recipe.party(name or (run.silos() or [recipe.silo[0].name])[0])
    rows = _Source(source, recipe, section, load_tokenizer(Path(recipe.model.path)))
    rows.check(recipe.model.path, max_new_tokens)
    with (
        _Answers(out, source) as answers,
        connected_silo(run, name, trunk=trunk, round=round, notify=notify) as (silo, _),
    ):
        by = (silo.name, silo.trunk.channel.welcome.completed)
        task = answering_task(recipe, max_new_tokens)
        answering = AnsweringModel(silo.name, silo.model, silo.tokenizer, silo.boundary.limited)
        answer = answerer_of(answering, recipe, task)
        questions = rows.questions()
        if done := answers.skip(questions, by):
            notify(f"going on after {done:,} answers in {out}")
        while window := list(islice(questions, IN_MEMORY)):
            _answer_window(answer, window, answer_groups(answering, [one.question for one in window]), answers, by)
            notify(f"{answers.count:,} answers")
        return answers.count


def _answer_window(
    answer: Answerer, window: Sequence[Posed], groups: Sequence[Sequence[int]], answers: _Answers, by: MadeBy
) -> None:
    """Answer these questions and write the answers in their order, as far as there is one to each before.

    Args:
        groups: numbers of the questions that are answered together.
    """
    said: dict[int, Said] = {}
    try:
        for group in groups:
            said.update(zip(group, answer([window[number].question for number in group]), strict=True))
    except BudgetExhausted as error:
        first = window[len(list(_whole(said)))]
        raise BudgetExhausted(
            f"{first.place} is not answered: {error.message}; the answers before it are in {answers.path}",
            remedy=f"{error.remedy}; the same command goes on from there",
        ) from error
    finally:  # also where a signal ends it
        answers.append([window[number].line(by) | _line(one) for number, one in enumerate(_whole(said))])


def _whole(said: dict[int, Said]) -> Iterator[Said]:
    """The answers to the first questions, as far as there is one to each."""
    number = 0
    while number in said:
        yield said[number]
        number += 1


def _line(said: Said) -> dict[str, Any]:
    line: dict[str, Any] = {"answer": said.answer, "finish": said.finish}
    return line | ({"log_probs": said.log_probs} if said.log_probs else {})


class _Source:
    """The questions of a file of rows, read as they are needed."""

    def __init__(self, path: Path, recipe: Recipe, section: SiloSection, tokenizer: PreTrainedTokenizerBase) -> None:
        self._path, self._recipe, self._tokenizer = path, recipe, tokenizer
        self._columns = section.columns or {}

    def check(self, model: str, longest: int | None) -> None:
        """Read all rows once, so that nothing is sent if one of them cannot be used.

        Args:
            model: its folder.
            longest: as ``max_new_tokens``.
        """
        config = AutoConfig.from_pretrained(model).get_text_config()
        room = getattr(config, "max_position_embeddings", None)
        written = answering_task(self._recipe, longest).longest
        bad, count = BadRows(), 0
        for one in self.questions(bad):
            count += 1
            length, largest = len(one.question.prompt), max(one.question.prompt)
            with bad.collecting():
                if room is not None and length + written > room:
                    raise DataError(
                        f"{one.place} has {length} tokens, which leave no room for {written} of an answer within the "
                        f"model's {room}",
                        remedy="shorten the row, or give a smaller --max-new-tokens",
                    )
                if largest >= config.vocab_size:
                    raise DataError(
                        f"{one.place} has the token {largest}, but the model has {config.vocab_size} tokens",
                        remedy="use the tokenizer that belongs to the model, without added tokens",
                    )
        bad.raise_any()
        if not count:
            raise DataError(f"{self._path} holds no row", remedy="put a row into it")

    def questions(self, bad: BadRows | None = None) -> Iterator[Posed]:
        """All questions, in their order.

        Args:
            bad: gets the errors of rows that cannot be used; None: they are raised.
        """
        collected = BadRows() if bad is None else bad
        for number, line in self._lines():
            before = collected.count
            with collected.collecting():
                yield from self._posed(number, line)
            if bad is None and collected.count > before:
                collected.raise_any()

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines that are not blank, with their numbers."""
        opened: Callable[..., IO[bytes]] = gzip.open if self._path.name.endswith(".gz") else open  # type: ignore[assignment]
        try:
            with opened(self._path, "rb") as file:
                for number, line in enumerate(file, 1):
                    text = line.removeprefix(BOM) if number == 1 else line
                    if text.strip():
                        yield number, text
        except (OSError, EOFError, zlib.error) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read the data file {self._path}: {why}", remedy="check the path") from error

    def _posed(self, number: int, line: bytes) -> list[Posed]:
        place, task = f"{self._path}:{number}", self._recipe.task
        fields = jsonl_row(place, line)
        known = {new: fields[old] for new, old in self._columns.items() if old in fields}
        try:
            examples = (
                asked_questions(SourceRow(place, {**fields, **known}), task)
                if task.name
                else [(place, asked_example({**fields, **known}, task))]
            )
            return [
                Posed(where, number, order, fields, self._question(example))
                for order, (where, example) in enumerate(examples, 1)
            ]
        except DataError as error:
            if error.message.startswith(place):
                raise
            raise DataError(f"{place}: {error.message}", remedy=error.remedy) from error

    def _question(self, example: Example) -> PosedQuestion:
        ids = prompt_tokens(example, self._tokenizer)
        if not ids:
            raise DataError("the prompt has no token", remedy="give it a text")
        names = example.item.names if example.item is not None else ()
        ends = () if example.choices or self._recipe.task.choices else ending_tokens(example, self._tokenizer)
        return PosedQuestion(ids, example.choices, names, tuple(ends))


class _Answers:
    """The file of answers. It grows by whole lines; what a crash left of a line is removed when it is opened.

    Args:
        source: the file of rows, which it must not be.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self.path, self.count = path, 0
        if path.exists() and source.exists() and path.samefile(source):
            raise DataError(f"{path} holds the rows themselves", remedy="name another file for the answers")

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            private_folder(self.path.parent)
            self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, PRIVATE), "r+b")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise RunError(
                    f"another process writes {self.path}", remedy="wait until it ends, or name another file"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def skip(self, questions: Iterator[Posed], by: MadeBy) -> int:
        """Pass over the questions that are answered already, whose number is returned.

        Raises:
            DataError: an answer is to another row, or by another silo or round.
        """
        with disk_errors(self.path):
            whole = 0
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                self._check(line, next(questions, None), by)
                whole += len(line)
                self.count += 1
            os.lseek(self._file.fileno(), whole, os.SEEK_SET)
            self._file.truncate(whole)
        return self.count

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append these lines, all of them or none."""
        data = memoryview("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())
        file = self._file.fileno()
        before = os.lseek(file, 0, os.SEEK_CUR)
        with disk_errors(self.path):
            try:
                while data:
                    data = data[os.write(file, data) :]
                os.fsync(file)
            except OSError:
                os.ftruncate(file, before)
                os.lseek(file, before, os.SEEK_SET)
                raise
        self.count += len(lines)

    def _check(self, line: bytes, asked: Posed | None, by: MadeBy) -> None:
        number = self.count + 1
        try:
            known = jsonl_row(f"{self.path}:{number}", line)
        except DataError as error:
            raise DataError(
                f"{self.path} holds no answers: {error.message}", remedy="name another file for the answers"
            ) from error
        expected = None if asked is None else asked.line(by)
        other = [key for key in expected or ("row",) if expected is None or known.get(key) != expected[key]]
        if other:
            raise DataError(
                f"line {number} of {self.path} is no answer to {'any row' if asked is None else asked.place} by "
                f"{by[0]} after round {by[1]}: its {', '.join(other)} differs",
                remedy="name another file for the answers, or remove that one",
            )
