"""What the gateway's batcher writes, for comparison with ``generate``."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from isthmus.gateway.batcher import Batcher
from isthmus.gateway.generation import AnswerPiece, Generation, GenerationEnd, GenerationRequest
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.drafting.draft import Draft

PATIENCE = 120.0


def words(ids: list[int]) -> str:
    """Token ids as text of which they can be read again."""
    return "".join(f" {token}" for token in ids)


@dataclass
class Collected:
    """What came of one request."""

    pieces: list[AnswerPiece] = field(default_factory=list)
    end: GenerationEnd | None = None
    over: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def __call__(self, piece: AnswerPiece | GenerationEnd) -> None:
        if isinstance(piece, GenerationEnd):
            assert self.end is None, "it ended twice"
            self.end = piece
            self.over.set()
        else:
            assert self.end is None, "a piece came after the end"
            self.pieces.append(piece)
        self.begun.set()

    def wait(self) -> GenerationEnd:
        assert self.over.wait(PATIENCE), "it never ended"
        assert self.end is not None
        return self.end

    @property
    def texts(self) -> list[str]:
        """Of each answer, all pieces together."""
        found: defaultdict[int, str] = defaultdict(str)
        for piece in self.pieces:
            found[piece.answer] += piece.text
        return [found[number] for number in sorted(found)]

    @property
    def ids(self) -> list[list[int]]:
        """The tokens of each answer."""
        return [[int(word) for word in text.split()] for text in self.texts]

    @property
    def finishes(self) -> list[str | None]:
        ended = {piece.answer: piece.finish for piece in self.pieces if piece.finish is not None}
        return [ended[number] for number in sorted(ended)]


@contextmanager
def batching(model: SplitForCausalLM, draft: Draft | None = None, **settings: Any) -> Iterator[Batcher]:
    """A batcher that runs while the block does."""
    batcher = Batcher(words, **settings)
    thread = threading.Thread(target=batcher.run, args=(model, draft), daemon=True)
    thread.start()
    with opened(batcher, thread):
        yield batcher


@contextmanager
def opened(batcher: Batcher, thread: threading.Thread) -> Iterator[None]:
    """Wait until the batcher that runs in this thread takes requests; end it with the block."""
    while not batcher.open:
        assert thread.is_alive()
        time.sleep(0.001)
    try:
        yield
    finally:
        batcher.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def written(batcher: Batcher, requests: Sequence[GenerationRequest]) -> list[Collected]:
    """All of these at once."""
    sinks = [Collected() for _ in requests]
    for request, sink in zip(requests, sinks, strict=True):
        started: Generation = batcher.submit(request, sink)
        assert not started.cancelled
    for sink in sinks:
        error = sink.wait().error
        assert error is None, error
    return sinks
