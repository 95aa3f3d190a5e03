"""Inference sessions: one silo's KV cache on the trunk, leased by time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from isthmus.errors import FrameError, OutOfOrderError, UnknownSessionError
from isthmus.recipe import TrunkSection
from isthmus.trunk.runner import Runner
from isthmus.wire import isthmus_pb2 as pb

Key = tuple[str, int]
"""The silo's certified name and the number it gave: no silo can name another's session."""


@dataclass
class Session:
    cache: DynamicCache
    real_BP: torch.Tensor
    """Which cached positions hold real tokens."""
    step: int
    used: float


class Sessions:
    """All sessions, the longest unused first. ``trunk.sessions`` of them are kept, each for ``trunk.lease`` seconds."""

    def __init__(self, runner: Runner, section: TrunkSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._runner = runner
        self._section = section
        self._clock = clock
        self._sessions: OrderedDict[Key, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    @torch.inference_mode()
    def decode(self, peer: str, request: pb.Decode, h_TD: torch.Tensor) -> torch.Tensor:
        """Continue (or, at step 0, open) a session with these tokens; returns the trunk's result ``[T, D]``.

        Raises:
            UnknownSessionError: it was evicted, has expired or never was; the silo replays its frames.
            OutOfOrderError: not the session's next step.
            FrameError: it forgets or keeps what is not there, or outgrows the model's context.
        """
        self._expire()
        key = (peer, request.session)
        session = self._open(key, len(request.lengths)) if request.step == 0 else self._find(key, request)
        if request.step:
            self._rewind(session, request)
        lengths = list(request.lengths)
        h_TD, session.real_BP = self._runner.continued(h_TD, lengths, session.real_BP, session.cache)
        session.step += 1
        return h_TD

    def close(self, peer: str, number: int) -> None:
        """Free a session; nothing happens if it is gone already."""
        self._sessions.pop((peer, number), None)

    def close_all(self, peer: str) -> None:
        """Free this silo's sessions."""
        for key in [key for key in self._sessions if key[0] == peer]:
            del self._sessions[key]

    def _open(self, key: Key, rows: int) -> Session:
        self._sessions.pop(key, None)
        while len(self._sessions) >= self._section.sessions:
            self._sessions.popitem(last=False)
        cache = DynamicCache(config=self._runner.part.config)
        cache.activate_past_recording()  # sliding-window layers then keep what a step may yet have to forget
        real_BP = torch.ones(rows, 0, dtype=torch.bool, device=self._runner.device)
        session = self._sessions[key] = Session(cache, real_BP, 0, self._clock())
        return session

    def _find(self, key: Key, request: pb.Decode) -> Session:
        session = self._sessions.get(key)
        if session is None:
            raise UnknownSessionError(
                f"no session {request.session} here", remedy="send its frames again from the first"
            )
        if request.step != session.step:
            raise OutOfOrderError(
                f"step {request.step} of session {request.session}, step {session.step} is next",
                remedy="send each step once, in order",
            )
        self._sessions.move_to_end(key)
        session.used = self._clock()
        return session

    def _rewind(self, session: Session, request: pb.Decode) -> None:
        """Forget positions and pick rows, as the silo's own caches did; all checks come before any change."""
        kept = session.real_BP.shape[1] - request.forget
        if kept < 1 or not bool(session.real_BP[:, kept:].all()):
            raise FrameError(f"{request.forget} positions to forget", remedy="forget no more than was sent")
        rows = list(request.rows) or list(range(session.real_BP.shape[0]))
        if max(rows) >= session.real_BP.shape[0] or len(rows) != len(request.lengths):
            raise FrameError(f"rows {rows[:8]} of {session.real_BP.shape[0]}", remedy="keep rows that are there")
        past_B = session.real_BP[rows, :kept].sum(dim=1).tolist()
        self._runner.check_context([past + new for past, new in zip(past_B, request.lengths, strict=True)])
        session.cache.crop(-request.forget)
        session.real_BP = session.real_BP[:, :kept]
        if request.rows:
            chosen = torch.tensor(rows, device=self._runner.device)
            session.cache.batch_select_indices(chosen)
            session.real_BP = session.real_BP[chosen]

    def _expire(self) -> None:
        oldest = self._clock() - self._section.lease
        while self._sessions and next(iter(self._sessions.values())).used < oldest:
            self._sessions.popitem(last=False)
