"""Conversations whose sessions are kept after an answer, for the next turn."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, takewhile

from isthmus.errors import IsthmusError
from isthmus.gateway.packed_ends import EndCaches
from isthmus.model.transcript import Transcript
from isthmus.silo.session import RemoteSession

REPEATS = 8
"""Times the tokens of a conversation that its session may have sent: a lost session is replayed from the first."""


@dataclass
class KeptConversation:
    """What an answer leaves behind, of one sequence."""

    first: list[int]
    """The prompt that the session began with: it names the record."""
    tokens: list[int]
    """Those in the caches of silo and trunk."""
    session: RemoteSession
    caches: EndCaches
    transcript: Transcript | None = None

    def shared(self, prompt: list[int]) -> int:
        """The number of a prompt's first tokens that need not cross again; 0: it is another record's.

        The prompt's last token always crosses: what follows it is computed of the answer.
        """
        if prompt[: len(self.first)] != self.first or not self.session.same_record(self.first, prompt):
            return 0
        pairs = zip(self.tokens, prompt[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def crop(self, length: int) -> None:
        """Keep this many tokens; at least one."""
        dropped = len(self.tokens) - length
        if dropped:
            self.caches.crop(dropped)
            self.session.crop(dropped)
            if self.transcript is not None:
                self.transcript.crop(dropped)
            del self.tokens[length:]

    def leave(self) -> None:
        """Free the trunk's memory."""
        with suppress(IsthmusError):  # a trunk that is gone has forgotten it
            self.session.abandon()


class KeptConversations:
    """Conversations that a next turn may go on with, least recently used first. One thread calls it.

    Args:
        most: number that are kept; 0: none.
        seconds: time after which one is dropped: the trunk's lease of its session.
    """

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._numbers = count()
        self._kept: OrderedDict[int, tuple[int, float, KeptConversation]] = OrderedDict()
        """By number: whose it is, when it was put here, and what it is."""

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, owner: int, prompt: list[int]) -> KeptConversation | None:
        """The conversation of this owner that shares most with a prompt, cropped to what it shares; None: none does.

        It is kept no more: one request at a time goes on with it.
        """
        self.expire()
        lengths = {number: one.shared(prompt) for number, (whose, _, one) in self._kept.items() if whose == owner}
        best = max(lengths, key=lengths.__getitem__, default=None)
        if best is None or not lengths[best]:
            return None
        _, _, found = self._kept.pop(best)
        found.crop(lengths[best])
        return found

    def put(self, owner: int, conversation: KeptConversation) -> None:
        """Keep a conversation; the least recently used one makes room.

        One that was changed so often that its session has sent ``REPEATS`` times what it holds is dropped.
        """
        if conversation.session.sent_tokens > REPEATS * len(conversation.tokens):
            conversation.leave()
            return
        self._kept[next(self._numbers)] = owner, self._clock(), conversation
        while len(self._kept) > self._most:
            self._drop(next(iter(self._kept)))

    def expire(self) -> None:
        """Drop those whose time is over."""
        ended = self._clock() - self._seconds
        for number in [number for number, (_, since, _) in self._kept.items() if since < ended]:
            self._drop(number)

    def clear(self) -> None:
        """Drop all."""
        while self._kept:
            self._drop(next(iter(self._kept)))

    def _drop(self, number: int) -> None:
        self._kept.pop(number)[2].leave()
