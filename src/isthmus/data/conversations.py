"""Conversations: a row's messages as examples, and examples in the model's own chat template.

Each turn of the assistant is an example of its own, whose prompt is what generation sends at that point. Templates
often write earlier turns otherwise than the last one, so that no single text holds the prompts of all turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from isthmus.data.encoding import CharSpan
from isthmus.data.known_task import asked_questions, task_examples
from isthmus.data.sources import SourceRow
from isthmus.data.templates import (
    Example,
    FieldSpan,
    Turn,
    chat_example,
    check_message,
    fill_prompt,
    fill_templates,
    no_choice,
)
from isthmus.errors import DataError, ModelError
from isthmus.recipe import TaskSection

ASSISTANT, SYSTEM = "assistant", "system"
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_ -]{0,31}")
"""Roles are written by the template among its control tokens, so they spell none."""
_EDGE = "\x1f"
"""White space at both sides of a mark: it is gone where a template strips what it is given."""
_MARK = re.compile(f"({_EDGE}?)\ue000(\\d+)\ue001({_EDGE}?)")


@dataclass(frozen=True)
class ChatText:
    """An example as the model's chat template writes it."""

    prompt: str
    """Up to where the assistant's answer begins."""
    answer: str
    """The answer with the end of its turn."""
    markup: tuple[CharSpan, ...]
    """Places in prompt + answer that the template wrote, control tokens among them."""
    spans: tuple[FieldSpan, ...]
    """Places in prompt + answer that have a sensitivity class."""
    head: int
    """Characters of the prompt up to the first turn after the system's."""
    question: int
    """The character at which the last turn before the answer begins, with what the template puts before it."""
    opening: int
    """The character behind that turn's content."""


def row_examples(row: SourceRow, task: TaskSection, classes: Mapping[str, str]) -> list[tuple[str, Example]]:
    """The examples of one row, each with its place: one, or of a conversation one for each turn to learn.

    Args:
        classes: sensitivity class by field name.

    Raises:
        DataError: the row cannot be used (see ``fill_templates``), or has no turn of the assistant to learn.
    """
    if task.name:
        return task_examples(row, task, classes)
    if not task.messages:
        return [(row.place, fill_templates(row, task, classes))]
    turns, fields = conversation_turns(row, task)
    found = [
        number
        for number, turn in enumerate(turns)
        if turn.role == ASSISTANT and number and fields[number] == task.messages[-1]
    ]
    if not found:
        raise DataError(f"{row.place} has no turn of the assistant after another turn", remedy="drop the row")
    if task.choices:
        _check_choice(row.place, [turns[number].content for number in found], task.choices)
    examples = [_until(number, turns, [classes.get(field, "") for field in fields]) for number in found]
    if len(found) == 1:
        return [(row.place, examples[0])]
    return [
        (f"{row.place}, turn {number + 1}", replace(example, conversation=row.place))
        for number, example in zip(found, examples, strict=True)
    ]


def asked_example(fields: Mapping[str, Any], task: TaskSection) -> Example:
    """The prompt that a training row with these fields has. A conversation is asked for its next turn; one that ends
    with the assistant's, for that turn again.

    Raises:
        DataError: a field is missing, or holds no text.
    """
    row = SourceRow("the prompt", dict(fields))
    if task.name:
        asked = asked_questions(row, task)
        if len(asked) > 1:
            raise DataError(
                f"these fields ask {len(asked)} questions of the task {task.name!r}",
                remedy="ask one, or answer whole rows with isthmus batch",
            )
        return asked[0][1]
    if not task.messages:
        return Example(fill_templates(row, task, {}).answer, "") if task.text else fill_prompt(row, task, {})
    present = tuple(name for name in task.messages if name in fields)
    turns, _ = conversation_turns(row, task.model_copy(update={"messages": present or task.messages}))
    return chat_example(turns[:-1] if turns[-1].role == ASSISTANT and len(turns) > 1 else turns)


def asked_text(text: str, task: TaskSection) -> Example:
    """The prompt for a text: the one field of the prompt's template, or the user's turn of a conversation.

    Raises:
        DataError: the template has another number of fields, or the text is empty.
    """
    check_message("the prompt", "text", text)
    if task.name:
        raise DataError(
            f"the prompts of the task {task.name!r} are made of a row's fields",
            remedy="give each with --field NAME=VALUE, or the whole prompt with --raw",
        )
    if task.messages:
        return asked_example({task.messages[0]: [{"role": "user", "content": text}]}, task)
    if task.text:
        return Example(text, "")
    if len(task.asked) != 1:
        names = ", ".join(task.asked) or "none"
        raise DataError(
            f"the recipe's prompt has {len(task.asked)} fields ({names}), and a text fills one",
            remedy="give each with --field NAME=VALUE, or the whole prompt with --raw",
        )
    return asked_example(nested_fields({task.asked[0]: text}), task)


def nested_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a row from the names by which a template asks for them: ``patient.age`` is a part of ``patient``.

    Raises:
        DataError: a name is both a field and a part of one.
    """
    fields: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = re.split(r"[.\[]", name.replace("]", ""))
        place: Any = fields
        for part in path:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last in place:
            raise DataError(f"the field {name!r} is given twice", remedy="give each field once")
        place[last] = value
    return fields


def conversation_turns(row: SourceRow, task: TaskSection) -> tuple[list[Turn], list[str]]:
    """A row's turns, with the task's system turn if they begin with none, and the field of each.

    Raises:
        DataError: a field holds no list of messages, each with a role and a text.
    """
    turns: list[Turn] = []
    fields: list[str] = []
    for name in task.messages:
        messages = _parsed(row.fields.get(name))
        if not isinstance(messages, list | tuple) or not messages:
            raise DataError(
                f"{row.place} has no list of messages in {name!r}", remedy="give it a list of {role, content}"
            )
        turns += [_turn(f"{row.place}, message {number} of {name!r},", one) for number, one in enumerate(messages, 1)]
        fields += [name] * len(messages)
    if task.system and turns[0].role != SYSTEM:
        return [Turn(SYSTEM, task.system), *turns], ["", *fields]
    return turns, fields


def _parsed(messages: Any) -> Any:
    """Messages that are written as JSON, as tables such as CSV must; anything else as it is."""
    with suppress(ValueError, RecursionError):
        return json.loads(messages) if isinstance(messages, str) else messages
    return messages


def _turn(place: str, message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"{place} is no object", remedy="write each message as {role, content}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise DataError(f"{place} has the role {role!r}", remedy="use roles such as system, user, assistant")
    if message.get("tool_calls") or message.get("function_call"):
        raise DataError(f"{place} calls a tool, which is no text", remedy="write the call as text, or drop the row")
    if isinstance(content, list):
        content = "".join(_part_text(place, part) for part in content)
    return Turn(role, check_message(place, "content", content))


def _part_text(place: str, part: Any) -> str:
    """The text of one part of a message in OpenAI's form."""
    if isinstance(part, Mapping) and part.get("type") == "text":
        return check_message(place, "text", part.get("text"))
    raise DataError(f"{place} has a part that is no text", remedy="leave images and sounds out")


def _check_choice(place: str, answers: Sequence[str], choices: Sequence[str]) -> None:
    """Refuse an answer that is no choice, and more than one: the length of the later prompt would tell the earlier."""
    if len(answers) > 1:
        raise DataError(
            f"{place} has {len(answers)} answers, and with task.choices a row has one",
            remedy="make a row of each, or name a last field in task.messages that holds one answer",
        )
    if answers[0] not in choices:
        raise no_choice(answers[0], choices, place)


def _until(number: int, turns: Sequence[Turn], classes: Sequence[str]) -> Example:
    """The example whose answer is this turn."""
    spans, start = [], 0
    for turn, name in zip(turns[: number + 1], classes, strict=False):
        spans += [(start, start + len(turn.content), name)] if name else []
        start += len(turn.content) + 1
    asked = chat_example(turns[:number])
    moved = [(one - 1, two - 1, name) if one > len(asked.prompt) else (one, two, name) for one, two, name in spans]
    return replace(asked, answer=turns[number].content, spans=tuple(moved))


class ChatTemplate:
    """The model's own chat template. It writes marks, in place of which texts are put: what a text says never becomes
    a part of the template.

    Raises:
        ModelError: the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            raise ModelError(
                "the model has no chat template", remedy="use a model for chats, or leave conversations out (task.chat)"
            )
        self._tokenizer = tokenizer
        self._marked: dict[tuple[tuple[str, ...], bool], str] = {}

    def write(self, example: Example) -> ChatText:
        """An example in the template. One that waits for its answer needs no turn of the assistant there.

        Raises:
            DataError: the template refuses its turns, demands what they lack, or leaves one out.
        """
        roles = tuple(turn.role for turn in example.turns)
        contents = [*(turn.content for turn in example.turns), example.answer]
        prompt, markup, places = _put(self._marks(roles, asking=True), contents)
        lead, answer, ending = self._around(roles, example.answer) if example.answer else ("", "", "")
        said = len(prompt) + len(lead), len(prompt) + len(lead) + len(answer)
        (start, opening), begun = places[-1], 2 if roles[0] == SYSTEM and len(roles) > 1 else 1
        return ChatText(
            prompt,
            lead + answer + ending,
            (*markup, (len(prompt), said[0]), (said[1], said[1] + len(ending))),
            tuple(self._moved(example, [*places, said])),
            head=places[begun - 1][0],
            question=places[-2][1] if len(places) > begun else start,
            opening=opening,
        )

    def _around(self, roles: tuple[str, ...], answer: str) -> tuple[str, str, str]:
        """What the template writes before an answer, if it goes on from the prompt; the answer; and what ends it."""
        asked, marks = self._marks(roles, asking=True), self._marks((*roles, ASSISTANT), asking=False)
        mark = [one for one in _MARK.finditer(marks) if int(one[2]) == len(roles)][-1]
        lead = marks[len(asked) : mark.start()] if marks.startswith(asked) else ""
        return lead, _stripped(answer, mark), marks[mark.end() :].rstrip()

    def _marks(self, roles: tuple[str, ...], *, asking: bool) -> str:
        """The template for turns of these roles, with marks for what they say."""
        key = roles, asking
        if key not in self._marked:
            turns = [
                {"role": role, "content": f"{_EDGE}\ue000{number}\ue001{_EDGE}"} for number, role in enumerate(roles)
            ]
            try:
                text = str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asking))
            except (TemplateError, LookupError, TypeError, ValueError, AttributeError) as error:
                raise DataError(
                    f"the model's chat template refuses turns of {', '.join(roles)}: {error}",
                    remedy="give the rows the turns that it asks for, or leave out task.system",
                ) from error
            absent = {*range(len(roles))} - {int(mark[2]) for mark in _MARK.finditer(text)}
            if absent:
                raise DataError(
                    f"the model's chat template leaves out turn {min(absent) + 1} of {', '.join(roles)}",
                    remedy="give the rows the turns that it writes, or leave out task.system",
                )
            self._marked[key] = text
        return self._marked[key]

    def _moved(self, example: Example, places: Sequence[CharSpan]) -> Iterator[FieldSpan]:
        """The example's classes at their places in the template.

        Args:
            places: of what each turn says, and of the answer.
        """
        start = 0
        contents = [*(turn.content for turn in example.turns), example.answer]
        for number, (content, (first, last)) in enumerate(zip(contents, places, strict=True)):
            start = len(example.prompt) if number == len(example.turns) else start
            shift = first - start - (len(content) - len(content.lstrip()) if last - first < len(content) else 0)
            for one, two, name in example.spans:
                if start <= one < start + len(content):
                    yield max(first, one + shift), min(last, two + shift), name
            start += len(content) + 1


def _put(marked: str, contents: Sequence[str]) -> tuple[str, list[CharSpan], list[CharSpan]]:
    """Texts in place of their marks, with the places of what stands around them, and the last place of each text."""
    text, done = "", 0
    markup: list[CharSpan] = []
    places: dict[int, CharSpan] = {}
    for mark in _MARK.finditer(marked):
        before, content = marked[done : mark.start()], _stripped(contents[int(mark[2])], mark)
        markup.append((len(text), len(text) + len(before)))
        places[int(mark[2])] = (len(text) + len(before), len(text) + len(before) + len(content))
        text, done = text + before + content, mark.end()
    markup.append((len(text), len(text) + len(marked) - done))
    return text + marked[done:], markup, [places[number] for number in sorted(places)]


def _stripped(content: str, mark: re.Match[str]) -> str:
    """A text without the white space that the template strips."""
    content = content if mark[1] else content.lstrip()
    return content if mark[3] else content.rstrip()
