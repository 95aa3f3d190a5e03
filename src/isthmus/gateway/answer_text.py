"""An answer's text as its tokens come, up to a text that stops it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.privacy.detokenizer import UNFINISHED


class AnswerText:
    """The text of one answer.

    What may still become a stop, or a character of several tokens, is held back.

    Args:
        decode: token ids as text, without control tokens.
        stop: texts before which the answer ends.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._before, self._read = 0, 0
        """Tokens from ``_before`` to ``_read`` are in ``text``; those after are decoded behind them."""
        self.text = ""
        """All text so far, up to the stop."""
        self._given = 0
        self.stopped = False
        """Whether a stop was reached."""

    def add(self, token: int) -> int:
        """Add the next token. Returns the place in the text where it begins."""
        place = len(self.text)
        self._ids.append(token)
        self._append(self._unread(finished=False))
        return place

    def finish(self) -> None:
        """The answer has ended: what was held back is text."""
        if not self.stopped:
            self._append(self._unread(finished=True))

    def take(self, *, ended: bool = False) -> str:
        """The text that is certain, and was not taken yet.

        Args:
            ended: whether the answer has ended, so that all of it is certain.
        """
        end = len(self.text) if ended or self.stopped else len(self.text) - self._maybe_stop()
        taken, self._given = self.text[self._given : end], max(self._given, end)
        return taken

    def _unread(self, *, finished: bool) -> str:
        """The text of the tokens that are not in ``text`` yet; empty while a character is unfinished."""
        known = self._decode(self._ids[self._before : self._read])
        both = self._decode(self._ids[self._before :])
        if len(both) <= len(known) or (both.endswith(UNFINISHED) and not finished):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return both[len(known) :]

    def _append(self, new: str) -> None:
        start = max(0, len(self.text) - max(map(len, self._stop), default=1) + 1)
        self.text += new
        places = [at for one in self._stop if (at := self.text.find(one, start)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True

    def _maybe_stop(self) -> int:
        """Number of last characters that may be the beginning of a stop."""
        longest = max((len(one) - 1 for one in self._stop), default=0)
        sizes = range(min(longest, len(self.text)), 0, -1)
        return next((size for size in sizes if any(one.startswith(self.text[-size:]) for one in self._stop)), 0)
