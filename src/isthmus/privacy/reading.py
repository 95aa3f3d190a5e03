"""Text read back from tokens as they come, with each token's characters and class.

A token may end within a character (byte-level vocabularies split those of several bytes): the characters of such
tokens are known once the last of them is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from isthmus.privacy.sensitivity import Sensitivity

Decode = Callable[[list[int]], str]
TAIL = 256
"""Characters before new text that are looked at again with it: they may be part of what the new text completes."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST = 8
"""Tokens that one character may take, at most; then the bytes are no text."""


class Reading:
    """One sequence's tokens so far, their text and their classes.

    Each stretch of text is looked at a bounded number of times, however the tokens come. What was found once is kept,
    even if what follows shows it to be something else.

    Args:
        decode: text of tokens.
    """

    def __init__(self, sensitivity: Sensitivity, decode: Decode) -> None:
        self.classes: list[int] = []
        """Of each token."""
        self.offsets: list[tuple[int, int]] = []
        self.text = ""
        self._sensitivity = sensitivity
        self._decode = decode
        self._tokens: list[int] = []
        self._whole = [0, 0]
        """Numbers of tokens after which the text was whole; new text is what decoding from the last but one adds."""

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Read on.

        Raises:
            DataError: the silo's own function failed.
        """
        first = len(self._tokens)
        for token in tokens:
            self._read(token)
        if len(self._tokens) > first:
            self._classify(first)

    def raise_to(self, classes: Iterable[int]) -> None:
        """What is known of the first tokens from elsewhere."""
        for place, number in enumerate(classes):
            self.classes[place] = max(self.classes[place], number)

    def forget(self, tokens: int) -> None:
        """Drop this many from the end."""
        left = len(self._tokens) - tokens
        del self._tokens[left:], self.classes[left:], self.offsets[left:]
        while len(self._whole) > 2 and self._whole[-1] > left:
            self._whole.pop()
        self.text = self.text[: self.offsets[self._whole[-1] - 1][1]] if self._whole[-1] else ""
        for place in range(self._whole[-1], left):
            self.offsets[place] = (len(self.text), len(self.text))

    def copy(self) -> Reading:
        twin = Reading(self._sensitivity, self._decode)
        twin.classes, twin.offsets, twin.text = list(self.classes), list(self.offsets), self.text
        twin._tokens, twin._whole = list(self._tokens), list(self._whole)
        return twin

    def _read(self, token: int) -> None:
        self._tokens.append(token)
        self.offsets.append((len(self.text), len(self.text)))
        before, whole = self._whole[-2:]
        old, new = self._decode(self._tokens[before:whole]), self._decode(self._tokens[before:])
        if new.endswith(UNFINISHED) and len(self._tokens) - whole < LONGEST:
            return
        end = len(self.text) + max(0, len(new) - len(old))
        for place in range(whole, len(self._tokens)):
            self.offsets[place] = (len(self.text), end)
        self.text += new[len(old) :]
        self._whole.append(len(self._tokens))

    def _classify(self, first: int) -> None:
        """Give the tokens from here on a class, and look again at the text just before them."""
        start = max(0, self.offsets[first][0] - TAIL)
        while start and not self.text[start - 1].isspace() and self.offsets[first][0] - start < 2 * TAIL:
            start -= 1
        again = first
        while again and self.offsets[again - 1][0] >= start:
            again -= 1
        shifted = [(one - start, two - start) for one, two in self.offsets[again:]]
        found = self._sensitivity.classes(self.text[start:], shifted)
        self.classes += [0] * (len(self._tokens) - len(self.classes))
        for place, number in enumerate(found, again):
            self.classes[place] = max(self.classes[place], number)
        for place in range(max(self._whole[-1], 1), len(self._tokens)):  # characters not known yet: as before them
            self.classes[place] = max(self.classes[place], self.classes[place - 1])
