"""Examples as tokens and as batches.

Shapes: B rows, L positions (padded on the left, so that every row ends at the same position), K supervised positions.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from isthmus.data.conversations import ChatTemplate
from isthmus.data.encoding import CharSpan, Encoded, TextEncoder
from isthmus.data.templates import Example, FieldSpan, no_choice
from isthmus.errors import DataError
from isthmus.model.crossing import IGNORED
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe.sections.task import Truncation


@dataclass(frozen=True, slots=True)
class Tokens:
    """One example as token ids."""

    prompt: list[int]
    answer: list[int]
    classes: tuple[int, ...] | None = None
    """Sensitivity class of each token of prompt + answer (see ``privacy.sensitivity``); None: not classified."""
    filler: tuple[int, ...] = ()
    """Tokens after the answer that have no loss: with them the answers to a prompt are equally long. Attention is
    causal, so they do not change the answer's loss."""
    conversation: str = ""
    """What the turns of one conversation, or the questions of one text, have in common: they are one record. Empty: the
    row is one by itself."""
    choices: tuple[tuple[int, ...], ...] = ()
    """The possible answers, where each row has its own; empty: ``task.choices``, or free text."""
    right: tuple[tuple[int, ...], ...] = ()
    """The right ones of ``choices``, where there are several; empty: ``answer`` alone is right."""

    @property
    def input(self) -> list[int]:
        """The tokens that the model reads: prompt, answer without its last token, which is only a label, and filler."""
        return [*self.prompt, *self.answer[:-1], *self.filler]

    @property
    def input_classes(self) -> tuple[int, ...]:
        """Sensitivity class of each token of ``input``, of filler that of the answer's last token; empty without
        classes."""
        if self.classes is None:
            return ()
        return self.classes[: len(self.input) - len(self.filler)] + self.classes[-1:] * len(self.filler)

    def crossing(self, tail: int | None) -> int:
        """Number of the input's last tokens whose hidden states cross to the trunk.

        Args:
            tail: ``boundary.tail``, the number of a prompt's last tokens that cross; None: all.
        """
        prompt = len(self.prompt)
        return len(self.input) - prompt + (prompt if tail is None else min(tail, prompt))


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length, as int64 tensors.

    An answer's last token is a target but not an input: no token follows it.
    """

    input_ids: torch.Tensor
    """``[B, L]``."""
    attention_mask: torch.Tensor
    """``[B, L]``, 1 at real tokens, 0 at padding."""
    position_ids: torch.Tensor
    """``[B, L]``."""
    targets: torch.Tensor
    """``[B, K]``: the next token at each of the last K positions, or ``IGNORED``."""
    filler: torch.Tensor
    """``[B]``: number of tokens after each row's answer."""

    @property
    def supervised(self) -> int:
        """Number of tokens with a loss."""
        return int((self.targets != IGNORED).sum())

    @property
    def weight(self) -> int:
        """Number of tokens of all answers with their filler, by which the summed loss is divided. It crosses, and with
        choices it follows from the number of rows alone."""
        return self.supervised + int(self.filler.sum())

    @property
    def tokens(self) -> int:
        """Number of input tokens, without padding."""
        return int(self.attention_mask.sum())

    def parts(self, count: int) -> list[Batch]:
        """This batch split by rows into at most ``count`` batches of nearly equal size."""
        pieces = (tensor.tensor_split(min(count, len(tensor))) for tensor in self._tensors())
        return [Batch(*piece) for piece in zip(*pieces, strict=True)]

    def to(self, device: torch.device) -> Batch:
        """This batch with its tensors on ``device``."""
        return Batch(*(tensor.to(device) for tensor in self._tensors()))

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for a causal model's forward with a loss."""
        return {**self.unsupervised(), **self.supervision()}

    def places(self) -> dict[str, Any]:
        """Mask and positions, for a forward without cache."""
        return {"attention_mask": self.attention_mask, "position_ids": self.position_ids, "use_cache": False}

    def unsupervised(self) -> dict[str, Any]:
        """Keyword arguments for a causal model's forward without a loss."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "logits_to_keep": self.targets.shape[1],
        }

    def supervision(self) -> dict[str, Any]:
        """The keyword arguments that a causal model's forward needs for the loss alone."""
        keep = self.targets.shape[1]
        loss = {"labels": self.targets, "shift_labels": self.targets, "logits_to_keep": keep}
        return loss | ({"num_items_in_batch": self.weight} if bool(self.filler.any()) else {})

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.input_ids, self.attention_mask, self.position_ids, self.targets, self.filler


def tokenize(
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    free_text: bool,
    choices: Sequence[str] = (),
    pad: int = 0,
    sensitivity: Sensitivity | None = None,
    truncate: Truncation = "front",
) -> list[Tokens]:
    """Examples as token ids, in their order.

    Args:
        max_tokens: longest prompt, answer and filler together; a longer prompt is shortened.
        free_text: append the end-of-text token to answers.
        choices: the possible answers of examples that have none of their own. A shorter one is filled up to the
            longest, and a row's classes are the same whichever is right.
        pad: token id of the filler.
        sensitivity: classifies each token; None: ``Tokens.classes`` stays None.
        truncate: which part of a long prompt is dropped. What the tokenizer puts before a text stays.

    Raises:
        DataError: an answer leaves no room for a prompt or is none of the choices, a prompt or an answer has no token,
            a text cannot be read (see ``encoding``), or the silo's own sensitivity function failed.
    """
    reader = _RowReader(tokenizer, max_tokens, free_text, choices, pad, sensitivity, truncate)
    return [reader.read(example) for example in examples]


def prompt_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a prompt that waits for its answer: those that a training row of this prompt has, if it fits into
    ``train.max_tokens``.

    Raises:
        DataError: the text cannot be read, or the model's chat template refuses the turns.
        ModelError: the example has turns, and the tokenizer no chat template.
    """
    return _RowReader(tokenizer, sys.maxsize, True, (), 0, None, "front").prompt(example)


def ending_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The control tokens that end an answer to this prompt: the end-of-text token, and of a chat that of a turn, if the
    model's chat template writes turns of the assistant.

    Raises:
        ModelError: as ``prompt_tokens``.
    """
    ends = {tokenizer.eos_token_id} - {None}
    with suppress(DataError):
        row = _RowReader(tokenizer, sys.maxsize, True, (), 0, None, "front").read(replace(example, answer="a"))
        ends.add(row.answer[-1])
    return sorted(one for one in ends if TextEncoder(tokenizer).controls(one))


def choice_tokens(tokenizer: PreTrainedTokenizerBase, choices: Sequence[str]) -> list[list[int]]:
    """The tokens of each possible answer, the same after every prompt: those that it has in running text.

    Where one is the beginning of another (" no", " no one") all of them end with the end-of-text token, if the
    tokenizer has one, so that they can be told apart.

    Raises:
        DataError: a choice has no token, or two have the same.
    """
    return [one.ids for one in _encoded_choices(TextEncoder(tokenizer), choices)]


def collate(rows: list[Tokens], pad: int) -> Batch:
    """Rows as one batch, padded on the left. A row without an answer is a prompt for the model to continue.

    Args:
        pad: token id for padding.
    """
    inputs = [row.input for row in rows]
    length = max(map(len, inputs))
    keep = max(1, *(len(row.answer) + len(row.filler) for row in rows))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    targets = torch.full((len(rows), keep), IGNORED)
    for number, (row, tokens) in enumerate(zip(rows, inputs, strict=True)):
        ids[number, -len(tokens) :] = torch.tensor(tokens)
        mask[number, -len(tokens) :] = 1
        end = keep - len(row.filler)
        targets[number, end - len(row.answer) : end] = torch.tensor(row.answer, dtype=torch.long)
    return Batch(ids, mask, positions(mask), targets, torch.tensor([len(row.filler) for row in rows]))


def positions(mask_BL: torch.Tensor) -> torch.Tensor:
    """Position of each real token within its row, ``[B, L]``; 0 at padding."""
    return (mask_BL.cumsum(dim=1) - 1).clamp_min(0)


def batches(rows: list[Tokens], size: int, seed: str) -> Iterator[list[Tokens]]:
    """Endless batches of ``size`` rows in an order fixed by the seed: every row once before any row comes again."""
    order = random.Random(seed)
    waiting: list[Tokens] = []
    while True:
        while len(waiting) < size:
            waiting += order.sample(rows, len(rows))
        yield waiting[:size]
        waiting = waiting[size:]


def epochs(rows: list[Tokens], size: int, seed: str) -> Iterator[list[Tokens]]:
    """Endless passes over the rows, each in its own order fixed by the seed, in batches of ``size`` rows. The last
    batch of a pass may be smaller."""
    order = random.Random(seed)
    while True:
        drawn = order.sample(rows, len(rows))
        yield from (drawn[start : start + size] for start in range(0, len(drawn), size))


@dataclass(frozen=True)
class _Text:
    """What the model reads of an example."""

    prompt: str
    answer: str
    spans: tuple[FieldSpan, ...]
    markup: tuple[CharSpan, ...] | None = None
    """Places that a chat template wrote; None: plain text."""
    fixed: tuple[int, int, int] | None = None
    """Of a chat: head, question and opening of ``ChatText``."""


class _RowReader:
    """Makes tokens of examples; the arguments are those of ``tokenize``."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        free_text: bool,
        choices: Sequence[str],
        pad: int,
        sensitivity: Sensitivity | None,
        truncate: Truncation,
    ) -> None:
        self._tokenizer, self._encoder = tokenizer, TextEncoder(tokenizer)
        self._template: ChatTemplate | None = None
        self._known: dict[tuple[str, ...], dict[str, Encoded]] = {}
        self._choices = self._in_tokens(tuple(choices))
        self._max_tokens, self._free_text, self._pad = max_tokens, free_text, pad
        self._sensitivity, self._truncate = sensitivity, truncate

    def read(self, example: Example) -> Tokens:
        """One example in tokens."""
        text = self._text(example)
        prompt, answer = self._pair(example, text)
        filled = max((len(one.ids) for one in self._of(example).values()), default=0)
        kept = prompt.only(self._kept(text, prompt, max(len(answer.ids), filled), bool(answer.ids)))
        row = Tokens(
            kept.ids,
            answer.ids,
            filler=(self._pad,) * (filled - len(answer.ids)),
            conversation=example.conversation,
            choices=tuple(tuple(one.ids) for one in self._of(example).values()) if example.choices else (),
            right=self._right(example),
        )
        if self._sensitivity is None:
            return row
        return replace(row, classes=self._classes(self._sensitivity, example, kept, answer))

    def prompt(self, example: Example) -> list[int]:
        """The prompt of an example that has no answer yet."""
        text = self._text(example)
        return self._encoder.prompt(text.prompt, text.markup).ids

    def _of(self, example: Example) -> dict[str, Encoded]:
        """An example's choices in tokens, its own or the task's; empty for free text."""
        return self._in_tokens(example.choices) if example.choices else self._choices

    def _right(self, example: Example) -> tuple[tuple[int, ...], ...]:
        """The right choices of a question that has several."""
        if example.item is None or not example.choices:
            return ()
        pairs = zip(example.item.names, self._of(example).values(), strict=True)
        right = tuple(tuple(one.ids) for name, one in pairs if name in example.item.right)
        return right if len(right) > 1 else ()

    def _in_tokens(self, choices: tuple[str, ...]) -> dict[str, Encoded]:
        if choices not in self._known:
            self._known[choices] = dict(zip(choices, _encoded_choices(self._encoder, choices), strict=True))
        return self._known[choices]

    def _text(self, example: Example) -> _Text:
        """What the model reads of an example."""
        if not example.turns:
            return _Text(example.prompt, example.answer, example.spans)
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer)
        chat = self._template.write(example)
        answer = example.answer if self._of(example) else chat.answer
        return _Text(chat.prompt, answer, chat.spans, chat.markup, (chat.head, chat.question, chat.opening))

    def _pair(self, example: Example, text: _Text) -> tuple[Encoded, Encoded]:
        """Prompt and answer, before anything is dropped. A choice has the same tokens after every prompt, so that
        answers are equally long whatever the prompt."""
        if choices := self._of(example):
            if example.answer not in choices:
                raise no_choice(example.answer, list(choices))
            return self._encoder.prompt(text.prompt, text.markup), choices[example.answer]
        prompt, answer = self._encoder.pair(text.prompt, text.answer, text.markup)
        if example.whole and not prompt.ids:
            prompt, answer = answer.first(1), answer.after(1)
        closed = bool(answer.ids) and text.markup is not None and self._encoder.controls(answer.ids[-1])
        return prompt, _ended(answer, self._encoder) if self._free_text and not closed else answer

    def _kept(self, text: _Text, prompt: Encoded, answer: int, answered: bool) -> Sequence[int]:
        """Numbers of the prompt's tokens that stay.

        Args:
            answer: number of tokens of the answer with its filler.
        """
        count, room = len(prompt.ids), self._max_tokens - answer
        first, last = self._fixed(text, count, room) if count > room else (0, 0)
        if not count or not answered or room < 1 or first + max(last, 1) > min(room, count):
            raise DataError(
                f"a row has {count} prompt and {answer} answer tokens; train.max_tokens is {self._max_tokens}",
                remedy="raise train.max_tokens, or remove rows without text",
            )
        if count <= room:
            return range(count)
        first = first if self._truncate == "front" else max(first, min(room // 2, room - last))
        return [*range(first), *range(count - room + first, count)]

    def _fixed(self, text: _Text, count: int, room: int) -> tuple[int, int]:
        """How many of the prompt's first and last tokens stay in any case: the tokenizer's beginning, and of a chat
        what comes before the first turn after the system's, and the last turn; if that is too long itself, only what
        follows it."""
        if text.fixed is None:
            return len(self._encoder.beginning), 0

        def until(place: int) -> int:
            return len(self._encoder.prompt(text.prompt[:place], text.markup).ids)

        head, question, opening = map(until, text.fixed)
        return head, count - (question if head + count - question <= room else opening)

    def _classes(self, sensitivity: Sensitivity, example: Example, prompt: Encoded, answer: Encoded) -> tuple[int, ...]:
        """Sensitivity class of each token of prompt + answer. With choices noise would tell which is right: a prompt's
        token has the greatest of its classes with any of them, an answer's token the greatest in any of them."""

        def of(one: Example, after: Encoded) -> list[int]:
            text = self._text(one)
            offsets = [*prompt.offsets, *after.offsets]
            return sensitivity.classes(text.prompt + text.answer, offsets, text.spans)

        if not (choices := self._of(example)):
            return tuple(of(example, answer))
        start = len(self._text(example).prompt)
        each = [of(example.answered(text), one.after(0, start)) for text, one in choices.items()]
        count = len(prompt.ids)
        worst = max(number for classes in each for number in classes[count:])
        return (*map(max, *(classes[:count] for classes in each)), *(worst,) * len(answer.ids))


def _encoded_choices(encoder: TextEncoder, choices: Sequence[str]) -> list[Encoded]:
    found = [encoder.answer(choice) for choice in choices]
    for number, one in enumerate(found):
        if not one.ids:
            raise DataError(f"the choice {choices[number]!r} has no token", remedy="give it a text in task.choices")
        same = [choice for choice, other in zip(choices[:number], found, strict=False) if other.ids == one.ids]
        if same:
            raise DataError(
                f"the choices {same[0]!r} and {choices[number]!r} have the same tokens",
                remedy="use texts in task.choices that this model can tell apart",
            )
    begun = any(one is not other and other.ids[: len(one.ids)] == one.ids for one in found for other in found)
    return [_ended(one, encoder) for one in found] if begun else found


def _ended(answer: Encoded, encoder: TextEncoder) -> Encoded:
    """An answer with the end-of-text token, which covers no characters."""
    return answer if encoder.end is None or not answer.ids else answer + Encoded([encoder.end], [(0, 0)])
