"""Examples as tokens and as batches.

Shapes: B rows, L positions (padded on the left, so that every row ends at the same position), K supervised positions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from isthmus.data.templates import Example
from isthmus.errors import DataError
from isthmus.model.crossing import IGNORED
from isthmus.privacy.sensitivity import Sensitivity


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
) -> list[Tokens]:
    """Examples as token ids, in their order.

    Args:
        max_tokens: longest prompt, answer and filler together; a longer prompt loses its beginning.
        free_text: append the end-of-text token to answers.
        choices: the possible answers. A shorter one is filled up to the longest, and a row's classes are the same
            whichever is right.
        pad: token id of the filler.
        sensitivity: classifies each token; None: ``Tokens.classes`` stays None.

    Raises:
        DataError: an answer leaves no room for a prompt, a prompt or an answer has no token, or the silo's own
            sensitivity function failed.
    """
    filled = max((len(tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in choices), default=0)
    rows = [_tokens(example, tokenizer, max_tokens, free_text, filled, pad) for example in examples]
    if sensitivity is None:
        return rows
    pairs = zip(rows, examples, strict=True)
    return [replace(row, classes=_row_classes(row, example, tokenizer, sensitivity, choices)) for row, example in pairs]


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


def _tokens(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int, free_text: bool, filled: int, pad: int
) -> Tokens:
    prompt: list[int] = tokenizer(example.prompt)["input_ids"]
    answer: list[int] = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    if free_text and tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    room = max_tokens - max(len(answer), filled)
    if not prompt or not answer or room < 1:
        raise DataError(
            f"a row has {len(prompt)} prompt and {max(len(answer), filled)} answer tokens; "
            f"train.max_tokens is {max_tokens}",
            remedy="raise train.max_tokens, or remove rows without text",
        )
    return Tokens(prompt[-room:], answer, filler=(pad,) * (filled - len(answer)))


def _row_classes(
    row: Tokens,
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    sensitivity: Sensitivity,
    choices: Sequence[str],
) -> tuple[int, ...]:
    """Sensitivity class of each token of prompt + answer. With choices noise would tell which is right: a prompt's
    token has the greatest of its classes with any of them, an answer's token the greatest in any of them."""
    if not choices:
        return _classes(row, example, tokenizer, sensitivity)
    each = [_classes(row, example.answered(choice), tokenizer, sensitivity) for choice in choices]
    prompt = len(row.prompt)
    answer = max(number for classes in each for number in classes[prompt:])
    return (*map(max, *(classes[:prompt] for classes in each)), *(answer,) * len(row.answer))


def _classes(
    row: Tokens, example: Example, tokenizer: PreTrainedTokenizerBase, sensitivity: Sensitivity
) -> tuple[int, ...]:
    """Sensitivity class of each token of prompt + answer. The end-of-text token covers no characters."""
    prompt: list[tuple[int, int]] = tokenizer(example.prompt, return_offsets_mapping=True)["offset_mapping"]
    own = tokenizer(example.answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    shift = len(example.prompt)
    answer = [(start + shift, end + shift) for start, end in own]
    end_of_text = [(0, 0)] * (len(row.answer) - len(answer))
    offsets = [*prompt[-len(row.prompt) :], *answer, *end_of_text]
    return tuple(sensitivity.classes(example.prompt + example.answer, offsets, example.spans))
