"""The incremental detokenizer: the text of a growing sequence of tokens, with each token's characters and class.

A token may end within a character, since byte-level vocabularies split characters of several bytes. The characters of
such tokens are known once the last of them has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from isthmus.privacy.sensitivity import Sensitivity

Decode = Callable[[list[int]], str]
"""Gives the text of tokens."""
CONTEXT_CHARACTERS = 256
"""Number of characters before new text that are classified again with it, since the new text may complete a span."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Last character of a decoded text that ends within a character."""
LONGEST_CHARACTER = 8
"""Largest number of tokens that one character may take; beyond it the bytes are not valid text."""


class Detokenizer:
    """The tokens of one sequence so far, their text and their sensitivity classes.

    Each part of the text is classified a bounded number of times, however many tokens come at once. A class once given
    is never lowered, even if later text contradicts it.

    Args:
        sensitivity: classifies the text.
        decode: gives the text of tokens.
    """

    def __init__(self, sensitivity: Sensitivity, decode: Decode) -> None:
        self.classes: list[int] = []
        """Class of each token."""
        self.offsets: list[tuple[int, int]] = []
        """Start and end of each token in ``text``, in characters."""
        self.text = ""
        """The text of all tokens whose characters are complete."""
        self._sensitivity = sensitivity
        self._decode = decode
        self._tokens: list[int] = []
        self._whole = [0, 0]
        """Token counts after which the text ended at a character. New text is decoded from the last but one of them."""

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens.

        Raises:
            DataError: the silo's own sensitivity function failed.
        """
        first = len(self._tokens)
        for token in tokens:
            self._read(token)
        if len(self._tokens) > first:
            self._classify(first)

    def raise_to(self, classes: Iterable[int]) -> None:
        """Raise the classes of the first tokens to at least these."""
        for place, number in enumerate(classes):
            self.classes[place] = max(self.classes[place], number)

    def forget(self, tokens: int) -> None:
        """Remove this many tokens from the end."""
        left = len(self._tokens) - tokens
        del self._tokens[left:], self.classes[left:], self.offsets[left:]
        while len(self._whole) > 2 and self._whole[-1] > left:
            self._whole.pop()
        self.text = self.text[: self.offsets[self._whole[-1] - 1][1]] if self._whole[-1] else ""
        for place in range(self._whole[-1], left):
            self.offsets[place] = (len(self.text), len(self.text))

    def copy(self) -> Detokenizer:
        """An independent copy of the same tokens."""
        twin = Detokenizer(self._sensitivity, self._decode)
        twin.classes, twin.offsets, twin.text = list(self.classes), list(self.offsets), self.text
        twin._tokens, twin._whole = list(self._tokens), list(self._whole)
        return twin

    def _read(self, token: int) -> None:
        self._tokens.append(token)
        self.offsets.append((len(self.text), len(self.text)))
        before, whole = self._whole[-2:]
        old, new = self._decode(self._tokens[before:whole]), self._decode(self._tokens[before:])
        if new.endswith(UNFINISHED) and len(self._tokens) - whole < LONGEST_CHARACTER:
            return
        end = len(self.text) + max(0, len(new) - len(old))
        for place in range(whole, len(self._tokens)):
            self.offsets[place] = (len(self.text), end)
        self.text += new[len(old) :]
        self._whole.append(len(self._tokens))

    def _classify(self, first: int) -> None:
        """Classify the tokens from ``first`` on, and again the text just before them."""
        start = max(0, self.offsets[first][0] - CONTEXT_CHARACTERS)
        most = 2 * CONTEXT_CHARACTERS
        while start and not self.text[start - 1].isspace() and self.offsets[first][0] - start < most:
            start -= 1
        again = first
        while again and self.offsets[again - 1][0] >= start:
            again -= 1
        shifted = [(one - start, two - start) for one, two in self.offsets[again:]]
        found = self._sensitivity.classes(self.text[start:], shifted)
        self.classes += [0] * (len(self._tokens) - len(self.classes))
        for place, number in enumerate(found, again):
            self.classes[place] = max(self.classes[place], number)
        for place in range(
            max(self._whole[-1], 1), len(self._tokens)
        ):  # incomplete characters: class of the token before
            self.classes[place] = max(self.classes[place], self.classes[place - 1])
