"""Text as token ids: a prompt and its answer as they stand together in running text.

A prompt has the same tokens whatever its answer, so that generation, which knows none, sends what training sent, and so
that no token of a prompt tells which answer is right. Text stays text: where it spells a control token, such as
``</s>`` or ``<|im_end|>``, it is read in two halves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from isthmus.errors import DataError

CharSpan = tuple[int, int]
"""First character, and the character after the last, of a part of a text."""
ANCHORS = ("\n", ":", "a")
"""Texts behind which an answer is read as running text: a SentencePiece tokenizer puts a space before what stands
alone. The first is taken that does not merge with the answer."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text in tokens."""

    ids: list[int] = field(default_factory=list)
    offsets: list[CharSpan] = field(default_factory=list)
    """The characters of each token; (0, 0) for each with a tokenizer that does not tell."""

    def __add__(self, other: Encoded) -> Encoded:
        return Encoded([*self.ids, *other.ids], [*self.offsets, *other.offsets])

    def first(self, tokens: int) -> Encoded:
        """The first ``tokens`` tokens."""
        return Encoded(self.ids[:tokens], self.offsets[:tokens])

    def after(self, tokens: int, shift: int = 0) -> Encoded:
        """The tokens after the first ``tokens``, their places moved by ``shift`` characters."""
        places = [(max(0, start + shift), max(0, end + shift)) for start, end in self.offsets[tokens:]]
        return Encoded(self.ids[tokens:], places)

    def only(self, kept: Sequence[int]) -> Encoded:
        """The tokens with these numbers."""
        return Encoded([self.ids[one] for one in kept], [self.offsets[one] for one in kept])


class TextEncoder:
    """Reads texts with one tokenizer, of any kind: byte-level, SentencePiece, WordPiece, fast or slow.

    Attributes:
        beginning: the tokens that the tokenizer puts before a text, such as the beginning-of-text token. What it
            puts after a text is left out: an answer follows.
        end: the end-of-text token; None: the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = {number for number, one in tokenizer.added_tokens_decoder.items() if one.special}
        special |= {number for number in tokenizer.all_special_ids if number is not None}
        special |= _turn_tokens(tokenizer)
        self._controls = {
            number: str(tokenizer.convert_ids_to_tokens(number)) for number in special - {tokenizer.unk_token_id}
        }
        """Control tokens with their spelling. The token for unknown characters may come from any text."""
        self.beginning = self._beginning()
        self.end: int | None = tokenizer.eos_token_id

    def controls(self, token: int) -> bool:
        """Whether this is a control token."""
        return token in self._controls

    def prompt(self, text: str, markup: Sequence[CharSpan] | None = None) -> Encoded:
        """A text at the beginning of a sequence.

        Args:
            markup: places that a chat template wrote. Control tokens are read there, the one at the beginning among
                them; None: the text is the user's throughout, and the tokenizer's own beginning is put before it.

        Raises:
            DataError: the text is not valid Unicode, or spells a control token that cannot be read otherwise.
        """
        begin = Encoded(self.beginning, [(0, 0)] * len(self.beginning)) if markup is None else Encoded()
        return begin + self._read(text, markup or ())

    def pair(self, prompt: str, answer: str, markup: Sequence[CharSpan] | None = None) -> tuple[Encoded, Encoded]:
        """A prompt, and the answer that follows it.

        Both are read together. If the prompt's tokens are other ones then, because a token would reach over the place
        where they meet, the prompt keeps its own, and the answer is read as running text.

        Args:
            markup: places in prompt + answer, as for ``prompt``.

        Returns:
            Both, with places in prompt + answer.

        Raises:
            DataError: as ``prompt``.
        """
        alone, together = self.prompt(prompt, markup), self.prompt(prompt + answer, markup)
        count = len(alone.ids)
        if together.first(count) == alone:
            return alone, together.after(count)
        start = len(prompt)
        within = [(max(0, one - start), two - start) for one, two in markup or () if two > start]
        return alone, self.answer(answer, within).after(0, start)

    def answer(self, text: str, markup: Sequence[CharSpan] = ()) -> Encoded:
        """A text as it is read behind other text.

        Args:
            markup: places in which control tokens are read.

        Raises:
            DataError: as ``prompt``.
        """
        return self._read(text, markup, running=True)

    def _read(self, text: str, markup: Sequence[CharSpan], *, running: bool = False) -> Encoded:
        """A text in tokens, divided within every control token that it spells outside of ``markup``."""
        cuts: set[int] = set()
        while True:
            places = [0, *sorted(cuts), len(text)]
            found = Encoded()
            for start, end in pairwise(places):
                piece = text[start:end]
                found += (self._running(piece) if running or start else self._plain(piece)).after(0, start)
            spelled = list(self._spelled(text, found, markup, cuts))
            if not spelled:
                return found
            for start, end in spelled:
                if end - start < 2 or start + 1 in cuts:
                    raise DataError(
                        f"the text {text[start:end]!r} is a control token of the model, and cannot be read as text",
                        remedy="take it out of the row",
                    )
                cuts.add(start + 1)

    def _spelled(self, text: str, found: Encoded, markup: Sequence[CharSpan], cuts: set[int]) -> Iterator[CharSpan]:
        """Places outside of ``markup`` that were read as control tokens."""
        read = [
            (number, place) for number, place in zip(found.ids, found.offsets, strict=True) if number in self._controls
        ]
        if self._tokenizer.is_fast:
            places = [self._exact(text, number, place) for number, place in read]
        else:  # the slow ones do not tell places: those of all spellings, if there is one control token too many
            literals = {self._controls[number] for number, _ in read}
            starts = [(at, at + len(one)) for one in literals for at in _occurrences(text, one)]
            places = [one for one in starts if not any(one[0] < cut < one[1] for cut in cuts)]
        for start, end in places:
            if not any(one <= start and end <= two for one, two in markup):
                yield start, end

    def _exact(self, text: str, number: int, place: CharSpan) -> CharSpan:
        """The place of the control token's spelling: some take the white space beside it with them."""
        start = text.find(self._controls[number], *place)
        return place if start < 0 else (start, start + len(self._controls[number]))

    def _running(self, text: str) -> Encoded:
        """A piece of text behind other text."""
        for anchor in ANCHORS:
            before, both = self._plain(anchor), self._plain(anchor + text)
            if both.first(len(before.ids)) == before:
                return both.after(len(before.ids), -len(anchor))
        return self._plain(text)

    def _plain(self, text: str) -> Encoded:
        """A piece of text alone, without what the tokenizer puts around it."""
        fast = self._tokenizer.is_fast
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"a text has one half of a surrogate pair, {text[error.start]!r}", remedy="write valid Unicode"
            ) from error
        read = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids: list[int] = read["input_ids"]
        return Encoded(ids, read["offset_mapping"] if fast else [(0, 0)] * len(ids))

    def _beginning(self) -> list[int]:
        bare = self._plain("a").ids
        whole: list[int] = self._tokenizer("a")["input_ids"]
        starts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
        return whole[: starts[0]] if bare and starts else []


def _turn_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Added tokens that the model's chat template writes around turns: some tokenizers do not mark them as special."""
    plain = {number: one.content for number, one in tokenizer.added_tokens_decoder.items() if not one.special}
    if not plain or tokenizer.chat_template is None:
        return set()
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    written = ""
    for asked in (turns, turns[1:]):
        with suppress(Exception):  # templates raise what they like about turns that they do not know
            written += str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    return {number for number, content in plain.items() if content.strip() and content in written}


def _occurrences(text: str, part: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)
