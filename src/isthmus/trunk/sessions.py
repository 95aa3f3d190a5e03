"""Inference sessions: one silo's KV caches on the trunk, leased by time, within a budget of memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus.errors import FrameError, OutOfOrderError, UnknownSessionError
from isthmus.recipe import TrunkSection
from isthmus.trunk.attention import SequenceCache
from isthmus.trunk.runner import Runner
from isthmus.wire import isthmus_pb2 as pb

GRACE = 2.0
"""Seconds after its last step in which a session does not have to make room: a newer one waits instead."""
Key = tuple[str, int]
"""The silo's certified name and the number it gave: no silo can name another's session."""


@dataclass
class Session:
    """One session. It takes part in the count and the memory once its first step is admitted."""

    key: Key
    rows: list[SequenceCache]
    """A row may stand here several times until the step that chose it so is admitted: copies take memory."""
    used: float
    step: int = 0
    even: int = 0
    """Positions at the end that every row has: as many can be forgotten."""
    busy: bool = False
    """A step is being computed; the session is not evicted meanwhile."""

    @property
    def nbytes(self) -> int:
        return sum({id(row): row.nbytes for row in self.rows}.values())

    def bytes_for(self, lengths: Sequence[int]) -> int:
        """Bytes of all caches once the rows have so many more tokens."""
        return sum(row.bytes_for(row.length + new) for row, new in zip(self.rows, lengths, strict=True))

    def grow(self, lengths: Sequence[int]) -> None:
        """Take the memory for so many more tokens, and copy rows that are there several times."""
        seen: set[int] = set()
        for place, (row, new) in enumerate(zip(self.rows, lengths, strict=True)):
            own = self.rows[place] = row.copy() if id(row) in seen else row
            seen.add(id(row))
            own.reserve(own.length + new)


class Sessions:
    """All sessions, the longest unused first.

    ``trunk.sessions`` of them in ``trunk.session_bytes`` are kept, each for ``trunk.lease`` seconds.
    """

    def __init__(self, runner: Runner, section: TrunkSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._runner = runner
        self._section = section
        self._clock = clock
        self._sessions: OrderedDict[Key, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def nbytes(self) -> int:
        """Bytes that all caches take."""
        return sum(session.nbytes for session in self._sessions.values())

    def start(self, peer: str, request: pb.Decode) -> Session:
        """The session of this step: a new one if it is step 0, rows and positions as asked.

        Raises:
            UnknownSessionError: it was evicted, has expired or never was; the silo replays its frames.
            OutOfOrderError: not the session's next step.
            FrameError: it forgets or keeps what is not there, outgrows the model's context or the trunk's memory.
        """
        self._expire()
        key = (peer, request.session)
        session = self._find(key, request) if request.step else self._new(key, request)
        if request.step:
            self._rewind(session, request)
        needed, budget = session.bytes_for(request.lengths), self._section.session_bytes
        if needed > budget:
            self._sessions.pop(key, None)
            raise FrameError(
                f"a session of {needed} bytes, trunk.session_bytes keeps {budget}",
                remedy="ask for fewer or shorter sequences, or raise trunk.session_bytes",
            )
        return session

    def admit(self, session: Session, lengths: Sequence[int]) -> bool:
        """Take the memory for so many more tokens, if it is there; sessions that rest are evicted for it.

        Raises:
            UnknownSessionError: the session itself had to make room meanwhile.
        """
        known = self._sessions.get(session.key) is session
        if session.step and not known:
            raise UnknownSessionError("the session had to make room", remedy="send its frames again from the first")
        if not self._make_room(session, session.bytes_for(lengths) - (session.nbytes if known else 0), int(not known)):
            return False
        session.grow(lengths)
        session.busy = True
        self._sessions[session.key] = session
        return True

    def finish(self, session: Session, lengths: list[int]) -> None:
        """The step is done: so many tokens were appended to the rows."""
        even = len(set(lengths)) == 1
        session.even = session.even + lengths[0] if even else min(lengths)
        session.step += 1
        session.busy = False
        session.used = self._clock()

    def close(self, peer: str, number: int) -> None:
        """Free a session; nothing happens if it is gone already."""
        self._sessions.pop((peer, number), None)

    def close_all(self, peer: str) -> None:
        """Free this silo's sessions."""
        for key in [key for key in self._sessions if key[0] == peer]:
            del self._sessions[key]

    def _new(self, key: Key, request: pb.Decode) -> Session:
        self._runner.check_context(list(request.lengths))
        self._sessions.pop(key, None)
        return Session(key, [self._runner.new_cache() for _ in request.lengths], self._clock())

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
        kept = [row.length - request.forget for row in session.rows]
        if request.forget > session.even or max(kept) < 1:
            raise FrameError(f"{request.forget} positions to forget", remedy="forget no more than was sent")
        rows = list(request.rows) or list(range(len(kept)))
        if max(rows) >= len(kept) or len(rows) != len(request.lengths):
            raise FrameError(f"rows {rows[:8]} of {len(kept)}", remedy="keep rows that are there")
        self._runner.check_context([kept[row] + new for row, new in zip(rows, request.lengths, strict=True)])
        for row, length in zip(session.rows, kept, strict=True):
            row.crop(length)
        session.even -= request.forget
        session.rows = [session.rows[row] for row in rows]

    def _make_room(self, session: Session, nbytes: int, places: int) -> bool:
        """Evict others that rest, the longest unused first, until so much more fits; none if that is not enough."""
        nbytes += self.nbytes - self._section.session_bytes
        places += len(self._sessions) - self._section.sessions
        resting, chosen = self._clock() - GRACE, []
        for key, one in self._sessions.items():
            if nbytes <= 0 and places <= 0:
                break
            if one is not session and not one.busy and one.used <= resting:
                chosen.append(key)
                nbytes, places = nbytes - one.nbytes, places - 1
        if nbytes > 0 or places > 0:
            return False
        for key in chosen:
            del self._sessions[key]
        return True

    def _expire(self) -> None:
        oldest = self._clock() - self._section.lease
        for key in [key for key, one in self._sessions.items() if one.used < oldest and not one.busy]:
            del self._sessions[key]
