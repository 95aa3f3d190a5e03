"""Continuous batching: the steps of all sessions that wait, and pieces of long prompts, in one pass.

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

FEW = 16
"""New tokens up to which a row is never cut: a decoded token, a few drafts."""
PAUSE = 0.05
"""Seconds until a step that found no memory is looked at again."""
SHARE = 0.2
"""Of the last pass's time, how long the next one waits for the sessions that were in it to come back."""


@dataclass(eq=False)
class Step:
    """A session's step on its way: what of each row has been computed."""

    silo: str
    request: pb.Decode
    session: Session | None = None
    ahead: list[torch.Tensor] = field(default_factory=list)
    """Of each row, the tokens still to come."""
    behind: list[list[torch.Tensor]] = field(default_factory=list)
    """Of each row, the results so far."""

    def begin(self, sessions: Sessions, codecs: Codecs) -> None:
        h_TD = codecs.hidden_in(self.request.hidden, sum(self.request.lengths))
        self.session = sessions.start(self.silo, self.request)
        self.ahead = list(torch.split(h_TD, list(self.request.lengths)))
        self.behind = [[] for _ in self.ahead]

    @property
    def result(self) -> torch.Tensor:
        """What the trunk makes of it, ``[T, D]``."""
        return torch.cat([piece for pieces in self.behind for piece in pieces])


@dataclass
class Piece:
    """The next tokens of one row."""

    step: Step
    row: int
    size: int


class Decoding:
    """The kind of job that continues a session. Requests are ``Step``; answers are messages.

    Args:
        chunk: tokens of long prompts that one pass takes, so that the others' next tokens need not wait.
    """

    def __init__(self, runner: Runner, sessions: Sessions, codecs: Codecs, chunk: int) -> None:
        self._runner = runner
        self._sessions = sessions
        self._codecs = codecs
        self._chunk = chunk
        self._answered: set[tuple[Hashable, ...]] = set()
        """Lanes of the last pass's finished steps."""
        self._until = 0.0
        """The next pass waits for those up to here."""

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        missing = self._answered - {job.lane for job in jobs}
        if missing and now < self._until:
            return [], self._until - now
        return [job for job in jobs if self._ready(job)], PAUSE

    @torch.inference_mode()
    def run(self, jobs: list[Job]) -> None:
        steps: list[Step] = [job.request for job in jobs]
        started = time.monotonic()
        try:
            self._advance(self._pieces(steps))
        except Exception:
            for step in steps:  # what their caches hold is unknown
                self._sessions.close(step.silo, step.request.session)
            raise
        for job, step in zip(jobs, steps, strict=True):
            if not any(len(rest) for rest in step.ahead):
                assert step.session is not None
                self._sessions.finish(step.session, list(step.request.lengths))
                job.settle(partial(self._codecs.hidden_out, step.result))
        self._answered = {job.lane for job in jobs if job.done.done()}
        self._until = (1 + SHARE) * time.monotonic() - SHARE * started

    def _ready(self, job: Job) -> bool:
        """Whether the step can be computed now; an error is its own and nobody else's."""
        step: Step = job.request
        try:
            if step.session is None:
                step.begin(self._sessions, self._codecs)
            assert step.session is not None
            return step.session.busy or self._sessions.admit(step.session, step.request.lengths)
        except Exception as error:
            job.done.set_exception(error)
            return False

    def _pieces(self, steps: list[Step]) -> list[Piece]:
        """All short rows whole, and of long ones what the chunk has room for; at least half of it is theirs."""
        rest = [(step, row, len(tokens)) for step in steps for row, tokens in enumerate(step.ahead) if len(tokens)]
        pieces = [Piece(*one) for one in rest if one[2] <= FEW]
        room = max(self._chunk - sum(piece.size for piece in pieces), self._chunk // 2, FEW)
        for step, row, tokens in rest:
            if tokens > FEW and room > 0:
                pieces.append(Piece(step, row, min(tokens, room)))
                room -= tokens
        return pieces

    def _advance(self, pieces: list[Piece]) -> None:
        sizes = [piece.size for piece in pieces]
        taken = [piece.step.ahead[piece.row][: piece.size] for piece in pieces]
        caches = [piece.step.session.rows[piece.row] for piece in pieces if piece.step.session is not None]
        results = torch.split(self._runner.continued(torch.cat(taken), sizes, caches), sizes)
        for piece, result_TD in zip(pieces, results, strict=True):
            piece.step.behind[piece.row].append(result_TD)
            piece.step.ahead[piece.row] = piece.step.ahead[piece.row][piece.size :]
