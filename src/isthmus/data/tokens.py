"""Examples as token batches. Everything here stays in the silo.

Shapes: B rows, L positions (padded on the left, so that every row ends at the same position).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
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
    """One example in tokens."""

    prompt: list[int]
    answer: list[int]
    classes: tuple[int, ...] | None = None
    """Of the tokens of prompt and answer, where they are asked for (see ``privacy.sensitivity``)."""

    @property
    def input(self) -> list[int]:
        """What the model reads: all but the answer's last token, which nothing follows."""
        return self.prompt + self.answer[:-1]

    def crossing(self, tail: int | None) -> int:
        """How many of the input's last tokens cross where a prompt's tail does; None: all."""
        prompt = len(self.prompt)
        return len(self.input) - prompt + (prompt if tail is None else min(tail, prompt))


@dataclass(frozen=True)
class Batch:
    """What a model's forward takes. Only the last positions are supervised, those that ``targets`` covers.

    An answer's last token is a target and no input: nothing follows it, and where answers are choices it is the label.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    """The token that each of these positions should predict, or ``IGNORED``."""

    @property
    def supervised(self) -> int:
        """Tokens with a loss: the weight of this batch."""
        return int((self.targets != IGNORED).sum())

    @property
    def tokens(self) -> int:
        return int(self.attention_mask.sum())

    def parts(self, count: int) -> list[Batch]:
        """This batch's rows in at most ``count`` batches of near equal size."""
        tensors = (self.input_ids, self.attention_mask, self.position_ids, self.targets)
        return [
            Batch(*piece)
            for piece in zip(*(tensor.tensor_split(min(count, len(tensor))) for tensor in tensors), strict=True)
        ]

    def to(self, device: torch.device) -> Batch:
        """The same on this device."""
        tensors = (self.input_ids, self.attention_mask, self.position_ids, self.targets)
        return Batch(*(tensor.to(device) for tensor in tensors))

    def inputs(self) -> dict[str, Any]:
        """Arguments of a causal model's forward that gives a loss."""
        return {**self.unsupervised(), **self.supervision()}

    def places(self) -> dict[str, Any]:
        """Mask and positions, for a forward without cache."""
        return {"attention_mask": self.attention_mask, "position_ids": self.position_ids, "use_cache": False}

    def unsupervised(self) -> dict[str, Any]:
        """The same without a loss."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "logits_to_keep": self.targets.shape[1],
        }

    def supervision(self) -> dict[str, Any]:
        """What a forward needs for the loss."""
        return {"labels": self.targets, "shift_labels": self.targets, "logits_to_keep": self.targets.shape[1]}


def tokenize(
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    free_text: bool,
    sensitivity: Sensitivity | None = None,
) -> list[Tokens]:
    """Examples in tokens.

    Args:
        max_tokens: longest prompt and answer together; a longer prompt loses its beginning.
        free_text: close answers with the end-of-text token.
        sensitivity: says how sensitive text is, if that is wanted.

    Raises:
        DataError: an answer alone is too long, or prompt or answer have no token; or the silo's own sensitivity
            function failed.
    """
    rows = [_tokens(example, tokenizer, max_tokens, free_text) for example in examples]
    if sensitivity is None:
        return rows
    pairs = zip(rows, examples, strict=True)
    return [replace(row, classes=_classes(row, example, tokenizer, sensitivity)) for row, example in pairs]


def collate(rows: list[Tokens], pad: int) -> Batch:
    """Rows as one batch, padded on the left. A row without an answer is a prompt to go on from."""
    inputs = [row.input for row in rows]
    length = max(map(len, inputs))
    keep = max(1, *(len(row.answer) for row in rows))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    targets = torch.full((len(rows), keep), IGNORED)
    for number, (row, tokens) in enumerate(zip(rows, inputs, strict=True)):
        ids[number, -len(tokens) :] = torch.tensor(tokens)
        mask[number, -len(tokens) :] = 1
        if row.answer:
            targets[number, -len(row.answer) :] = torch.tensor(row.answer)
    return Batch(ids, mask, positions(mask), targets)


def positions(mask_BL: torch.Tensor) -> torch.Tensor:
    """Position of each real token within its row; 0 at padding."""
    return (mask_BL.cumsum(dim=1) - 1).clamp_min(0)


def batches(rows: list[Tokens], size: int, seed: str) -> Iterator[list[Tokens]]:
    """Endless batches in an order that only the seed fixes: every row once before any comes again."""
    order = random.Random(seed)
    waiting: list[Tokens] = []
    while True:
        while len(waiting) < size:
            waiting += order.sample(rows, len(rows))
        yield waiting[:size]
        waiting = waiting[size:]


def _tokens(example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int, free_text: bool) -> Tokens:
    prompt: list[int] = tokenizer(example.prompt)["input_ids"]
    answer: list[int] = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    if free_text and tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    room = max_tokens - len(answer)
    if not prompt or not answer or room < 1:
        raise DataError(
            f"a row of {len(prompt)} prompt and {len(answer)} answer tokens", remedy="raise train.max_tokens"
        )
    return Tokens(prompt[-room:], answer)


def _classes(
    row: Tokens, example: Example, tokenizer: PreTrainedTokenizerBase, sensitivity: Sensitivity
) -> tuple[int, ...]:
    """The class of each token of a row; the end-of-text token stands for no text."""
    prompt: list[tuple[int, int]] = tokenizer(example.prompt, return_offsets_mapping=True)["offset_mapping"]
    told = tokenizer(example.answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    moved = len(example.prompt)
    answer = [(start + moved, end + moved) for start, end in told]
    closing = [(0, 0)] * (len(row.answer) - len(answer))
    offsets = [*prompt[-len(row.prompt) :], *answer, *closing]
    return tuple(sensitivity.classes(example.prompt + example.answer, offsets, example.spans))
