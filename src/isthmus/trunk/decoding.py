"""Continuous batching with chunked prefill: one pass computes the waiting steps of all sessions and chunks of long
prompts.

Shapes: T tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial

import torch

from isthmus.trunk.codecs import Codecs
from isthmus.trunk.runner import Runner
from isthmus.trunk.scheduler import Job
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


class Decoding:
    """The job kind of inference steps. A job's request is a ``SessionStep``; its answer is a message.

    Args:
        chunk: number of tokens of one pass above which long prompts are split, so that other sessions need not wait.
    """

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
        return [job for job in jobs if self._ready(job)], RETRY_SECONDS

    @torch.inference_mode()
    def run(self, jobs: list[Job]) -> None:
        steps: list[SessionStep] = [job.request for job in jobs]
        started = time.monotonic()
        try:
            self._advance(self._chunks(steps))
        except Exception:
            for step in steps:  # their caches may be half written
                self._sessions.close(step.silo, step.request.session)
            raise
        for job, step in zip(jobs, steps, strict=True):
            if not any(map(len, step.pending)):
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
        """The chunks of the next pass: all short rows whole, and long rows in the room that is left, at least half of
        ``chunk`` tokens."""
        rest = [(step, row, len(tokens)) for step in steps for row, tokens in enumerate(step.pending) if len(tokens)]
        chunks = [Chunk(*one) for one in rest if one[2] <= SHORT_ROW]
        room = max(self._chunk - sum(chunk.size for chunk in chunks), self._chunk // 2, SHORT_ROW)
        for step, row, tokens in rest:
            if tokens > SHORT_ROW and room > 0:
                chunks.append(Chunk(step, row, min(tokens, room)))
                room -= tokens
        return chunks

    def _advance(self, chunks: list[Chunk]) -> None:
        sizes = [chunk.size for chunk in chunks]
        taken = [chunk.step.pending[chunk.row][: chunk.size] for chunk in chunks]
        caches = [chunk.step.session.rows[chunk.row] for chunk in chunks if chunk.step.session is not None]
        ends = [chunk.step.ends[chunk.row] for chunk in chunks]
        results = torch.split(self._runner.cached_pass(torch.cat(taken), sizes, caches, ends), sizes)
        for chunk, result_TD in zip(chunks, results, strict=True):
            chunk.step.results[chunk.row].append(result_TD)
            chunk.step.pending[chunk.row] = chunk.step.pending[chunk.row][chunk.size :]
