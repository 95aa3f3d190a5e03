"""Requests' texts as the model's tokens: those that training and ``isthmus generate`` make of them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from isthmus.data.templates import Example, Turn, chat_example
from isthmus.data.tokens import ending_tokens, prompt_tokens
from isthmus.errors import DataError


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt in tokens."""

    ids: list[int]
    ends: tuple[int, ...]
    """Tokens that end an answer to it."""


class PromptReader:
    """Makes prompts; may be called from any thread.

    Args:
        vocabulary: number of tokens.
        ends: tokens at which any answer ends.
        system: the recipe's first turn of a conversation that has none of its own; empty: none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Iterable[int] = (), system: str = ""
    ) -> None:
        self.vocabulary, self._own_ends, self._system = vocabulary, frozenset(ends), system
        self._tokenizer = copy.deepcopy(tokenizer)  # a fast tokenizer must not be used by two threads
        self._lock = threading.Lock()

    def conversation(self, turns: Sequence[Turn]) -> ReadPrompt:
        """A conversation in the model's own chat template.

        Raises:
            ModelError: the model has none.
            DataError: the template refuses the turns, or a text cannot be read.
        """
        if self._system and turns[0].role != "system":
            turns = [Turn("system", self._system), *turns]
        return self._read(chat_example(turns))

    def text(self, prompt: str) -> ReadPrompt:
        """A text as it is.

        Raises:
            DataError: it cannot be read.
        """
        return self._read(Example(prompt, ""))

    def ids(self, prompt: list[int]) -> ReadPrompt:
        """Token ids as they are.

        Raises:
            DataError: one is not in the vocabulary.
        """
        if max(prompt) >= self.vocabulary:
            raise DataError(
                f"the prompt holds token {max(prompt)}, and the vocabulary is 0 to {self.vocabulary - 1}",
                remedy="use this model's tokenizer",
            )
        with self._lock:
            return ReadPrompt(prompt, self._ends(Example("", "")))

    def spelled(self, tokens: Sequence[int]) -> list[str]:
        """Each token's own text."""
        with self._lock:
            return [str(self._tokenizer.decode([token])) for token in tokens]

    def _read(self, example: Example) -> ReadPrompt:
        with self._lock:
            ids = prompt_tokens(example, self._tokenizer)
            if not ids:
                raise DataError("the prompt has no token", remedy="give it a text")
            return ReadPrompt(ids, self._ends(example))

    def _ends(self, example: Example) -> tuple[int, ...]:
        return tuple(sorted(self._own_ends.union(ending_tokens(example, self._tokenizer))))
