"""Continuous batching with chunked prefill: one pass computes the waiting steps of all sessions and chunks of long
prompts.

Shapes: T tokens, D width.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial

import torch

from isthmus.trunk.codecs import Codecs
from isthmus.trunk.packed_attention import SequenceCache
from isthmus.trunk.runner import Runner
from isthmus.trunk.scheduler import Job, fair_shares
from isthmus.trunk.sessions import Session, Sessions
from isthmus.wire import isthmus_pb2 as pb

SHORT_ROW = 16
"""Largest number of new tokens of a row that is never split: a decoded token and a few draft tokens."""
RETRY_SECONDS = 0.05
"""Seconds until a step that found no memory is tried again."""
WAIT_SHARE = 0.2
"""Share of the last pass's duration that the next pass waits for the sessions of the last one to send their next
step."""


@dataclass(eq=False)
class SessionStep:
    """A session's step and the progress of its rows."""

    silo: str
    request: pb.Decode
    session: Session | None = None
    pending: list[torch.Tensor] = field(default_factory=list)
    """Hidden states of each row's tokens that are not computed yet, ``[tokens, D]``."""
    results: list[list[torch.Tensor]] = field(default_factory=list)
    """Results of each row's computed chunks."""
    ends: list[int | None] = field(default_factory=list)
    """Length of each row at the end of the step; None if its tokens are computed as if each came alone."""

    def begin(self, sessions: Sessions, codecs: Codecs) -> None:
        """Decode the request and find or create its session.

        Raises:
            FrameError, OutOfOrderError, UnknownSessionError: see ``Codecs.decode_hidden`` and ``Sessions.start``.
        """
        h_TD = codecs.decode_hidden(self.request.hidden, sum(self.request.lengths))
        self.session = sessions.start(self.silo, self.request)
        self.pending = list(torch.split(h_TD, list(self.request.lengths)))
        self.results = [[] for _ in self.pending]
        rows = zip(self.session.rows, self.request.lengths, strict=True)
        self.ends = [None if self.request.drafted else row.length + new for row, new in rows]

    @property
    def result(self) -> torch.Tensor:
        """The results of all rows, ``[T, D]``."""
        return torch.cat([chunk for chunks in self.results for chunk in chunks])


@dataclass
class Chunk:
    """The next ``size`` tokens of one row."""

    step: SessionStep
    row: int
    size: int

    @property
    def cache(self) -> SequenceCache:
        """The row's cache."""
        assert self.step.session is not None
        return self.step.session.rows[self.row]


class Decoding:
    """The job kind of inference steps. A job's request is a ``SessionStep``; its answer is a message.

    Args:
        chunk: number of tokens of one pass above which long prompts are split, so that other sessions need not wait.
    """

    rests = False

    def __init__(self, runner: Runner, sessions: Sessions, codecs: Codecs, chunk: int) -> None:
        self._runner = runner
        self._sessions = sessions
        self._codecs = codecs
        self._chunk = chunk
        self._answered: set[tuple[Hashable, ...]] = set()
        """Lanes of the steps that the last pass finished."""
        self._until = 0.0
        """Time until which the next pass waits for these lanes."""

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        missing = self._answered - {job.lane for job in jobs}
        if missing and now < self._until:
            return [], self._until - now
        ready, full = [], set()
        for job in sorted(jobs, key=lambda job: job.since):  # whoever has waited for memory longest gets it first
            new = not job.request.request.step
            if new and job.silo in full:
                continue  # the silo's first new session that found no memory waits for it before the others
            if self._ready(job):
                ready.append(job)
            elif new and not job.done.done():
                full.add(job.silo)
        return ready, RETRY_SECONDS

    @torch.inference_mode()
    def run(self, jobs: list[Job]) -> None:
        started = time.monotonic()
        chunks = self._chunks([job.request for job in jobs])
        lengths = [(chunk.cache, chunk.cache.length) for chunk in chunks]
        try:
            self._advance(chunks)
        except Exception:
            for cache, length in lengths:
                cache.crop(length)
            self._advance_alone(jobs, chunks)
        for job in jobs:
            step: SessionStep = job.request
            if not job.done.done() and not any(map(len, step.pending)):
                assert step.session is not None
                self._sessions.finish(step.session, list(step.request.lengths))
                job.settle(partial(self._codecs.encode_hidden, step.result))
        self._answered = {job.lane for job in jobs if job.done.done()}
        self._until = (1 + WAIT_SHARE) * time.monotonic() - WAIT_SHARE * started

    def _ready(self, job: Job) -> bool:
        """Whether the step can be computed now. An error is its job's answer and does not affect other jobs."""
        step: SessionStep = job.request
        try:
            if step.session is None:
                step.begin(self._sessions, self._codecs)
            assert step.session is not None
            return self._sessions.admit(step.session, step.request.lengths)
        except Exception as error:
            job.done.set_exception(error)
            return False

    def _chunks(self, steps: list[SessionStep]) -> list[Chunk]:
        """The chunks of the next pass. Silos share ``chunk`` tokens: of each silo first short rows whole, then long
        rows in the room that is left. A silo alone gets all its short rows, and at least half of ``chunk`` of long
        ones."""
        own: dict[str, list[SessionStep]] = {}
        for step in steps:
            own.setdefault(step.silo, []).append(step)
        if len(own) == 1:
            return self._chunks_of(steps, self._chunk, whole=True)
        wanted = {silo: sum(map(len, itertools.chain(*(step.pending for step in mine)))) for silo, mine in own.items()}
        shares = fair_shares(wanted, max(self._chunk, len(own)))
        return [chunk for silo, mine in own.items() for chunk in self._chunks_of(mine, shares[silo])]

    def _chunks_of(self, steps: list[SessionStep], room: int, *, whole: bool = False) -> list[Chunk]:
        rest = [(step, row, len(tokens)) for step in steps for row, tokens in enumerate(step.pending) if len(tokens)]
        chunks, half = [], self._chunk // 2
        for step, row, tokens in rest:
            if tokens <= SHORT_ROW and (whole or room > 0):
                chunks.append(Chunk(step, row, tokens))
                room -= tokens
        room = max(room, half, SHORT_ROW) if whole else room
        for step, row, tokens in rest:
            if tokens > SHORT_ROW and room > 0:
                chunks.append(Chunk(step, row, min(tokens, room)))
                room -= tokens
        return chunks

    def _advance_alone(self, jobs: list[Job], chunks: list[Chunk]) -> None:
        """Compute each step's chunks by themselves; a step that fails is refused alone, and its session is closed."""
        for job in jobs:
            step: SessionStep = job.request
            try:
                self._advance([chunk for chunk in chunks if chunk.step is step])
            except Exception as error:
                self._sessions.close(step.silo, step.request.session)
                job.done.set_exception(error)

    def _advance(self, chunks: list[Chunk]) -> None:
        if not chunks:
            return
        sizes = [chunk.size for chunk in chunks]
        taken = [chunk.step.pending[chunk.row][: chunk.size] for chunk in chunks]
        caches = [chunk.cache for chunk in chunks]
        ends = [chunk.step.ends[chunk.row] for chunk in chunks]
        results = torch.split(self._runner.cached_pass(torch.cat(taken), sizes, caches, ends), sizes)
        for chunk, result_TD in zip(chunks, results, strict=True):
            chunk.step.results[chunk.row].append(result_TD)
            chunk.step.pending[chunk.row] = chunk.step.pending[chunk.row][chunk.size :]
