"""One HTTP request's generations: their pieces as they come, until they end or nobody waits any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.gateway.batcher import Batcher
from isthmus.gateway.generation import AnswerPiece, Generation, GenerationEnd, GenerationRequest
from isthmus.gateway.privacy_charge import PrivacyCharge
from isthmus.gateway.problems import problem_of
from isthmus.gateway.responses import Usage
from isthmus.privacy.events import Release

ReceiveMessage = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""Gives the next message of a client's connection, in the terms of ASGI."""


class ClientGone(Exception):  # noqa: N818 (no failure of ours)
    """Nobody waits for the answer any more."""


class ClientExchange:
    """The generations of one HTTP request. Answers of the first prompt are numbered first.

    Args:
        delta: the delta of the charge.
    """

    def __init__(
        self, batcher: Batcher, requests: Sequence[GenerationRequest], receive: ReceiveMessage, delta: float
    ) -> None:
        self._batcher, self._requests, self._receive, self._delta = batcher, requests, receive, delta
        self._queue: asyncio.Queue[tuple[int, AnswerPiece | GenerationEnd] | None] = asyncio.Queue()
        """None: the client has gone."""
        self._started: list[Generation] = []
        self._ended: list[GenerationEnd] = []

    @property
    def charge(self) -> PrivacyCharge:
        """What has left for what has ended."""
        releases: list[Release] = [one for end in self._ended for one in end.releases]
        return PrivacyCharge.of(releases, self._delta)

    @property
    def usage(self) -> Usage:
        """The prompts' tokens, and those written by what has ended."""
        prompts, ended = sum(len(one.prompt) for one in self._requests), self._ended
        return Usage(prompts, sum(one.written for one in ended), sum(one.reused for one in ended))

    async def pieces(self) -> AsyncGenerator[AnswerPiece, None]:
        """All pieces as they come. However it ends, nothing more is computed.

        Raises:
            Problem: a generation ended early, or there is no room for it; the others of the request end then, too.
            ClientGone: the client has closed its connection.
        """
        watching = asyncio.create_task(self._watch())
        try:
            error = self._start()
            while len(self._ended) < len(self._started):
                found = await self._queue.get()
                if found is None:
                    raise ClientGone
                prompt, piece = found
                if isinstance(piece, GenerationEnd):
                    self._ended.append(piece)
                    error = error or piece.error
                elif error is None:
                    yield replace(piece, answer=prompt * self._requests[0].answers + piece.answer)
                if error is not None:
                    self._cancel()
            if error is not None:
                raise problem_of(error, self.charge.headers())
        finally:
            watching.cancel()
            self._cancel()

    def _start(self) -> IsthmusError | None:
        """Submit all; returns the error of the first that is not taken."""
        loop = asyncio.get_running_loop()

        def sink(prompt: int) -> Callable[[AnswerPiece | GenerationEnd], None]:
            def put(found: AnswerPiece | GenerationEnd) -> None:
                with suppress(RuntimeError):  # the loop is closed: the server has stopped
                    loop.call_soon_threadsafe(self._queue.put_nowait, (prompt, found))

            return put

        try:
            for number, request in enumerate(self._requests):
                self._started.append(self._batcher.submit(request, sink(number)))
        except IsthmusError as error:
            self._cancel()
            return error
        return None

    def _cancel(self) -> None:
        for one in self._started:
            self._batcher.cancel(one)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(None)


async def begun(pieces: AsyncGenerator[AnswerPiece, None]) -> AsyncGenerator[AnswerPiece, None]:
    """The same pieces, once the first is there: an error before it is the answer's status."""
    first = await anext(pieces)

    async def all_of_them() -> AsyncGenerator[AnswerPiece, None]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return all_of_them()
