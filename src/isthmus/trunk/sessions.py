"""Inference sessions: the silos' KV caches on the trunk, leased for a time and bounded in memory."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from isthmus.errors import FrameError, OutOfOrderError, UnknownSessionError
from isthmus.recipe import TrunkSection
from isthmus.trunk.packed_attention import SequenceCache
from isthmus.trunk.runner import Runner
from isthmus.wire import isthmus_pb2 as pb

EVICTION_GRACE = 2.0
"""Seconds after its last step during which a session is not evicted; if its silo has more than its share, seconds
after its first."""
LONG = 10
"""Times ``EVICTION_GRACE``: idle for so long, a session makes room even if its silo has no more than its share; held
for so long, even if it alone is more than the share of its silo."""
SessionKey = tuple[str, int]
"""The silo's certified name and the number that the silo chose, so that it cannot name another silo's session."""


@dataclass
class Session:
    """One session. It counts towards the limits once its first step is admitted."""

    key: SessionKey
    rows: list[SequenceCache]
    """Cache of each row. One cache may be listed several times until the step that selected it so is admitted, since
    copies take memory."""
    last_used: float
    """Time of the last step, by the clock of ``Sessions``."""
    began: float | None = None
    """Time since which a session of this number is held; None: not yet."""
    step: int = 0
    """Number of the next step."""
    croppable: int = 0
    """Number of positions that can be dropped from the end of every row."""
    busy: bool = False
    """Whether a step has begun and is not done."""

    @property
    def nbytes(self) -> int:
        """Bytes that the session's caches take."""
        return sum({id(row): row.nbytes for row in self.rows}.values())

    def bytes_for(self, lengths: Sequence[int]) -> int:
        """Bytes that the caches take with this many more tokens in each row."""
        return sum(row.bytes_for(row.length + new) for row, new in zip(self.rows, lengths, strict=True))

    def grow(self, lengths: Sequence[int]) -> None:
        """Allocate memory for this many more tokens in each row, and copy caches that are listed several times."""
        seen: set[int] = set()
        for place, (row, new) in enumerate(zip(self.rows, lengths, strict=True)):
            own = self.rows[place] = row.copy() if id(row) in seen else row
            seen.add(id(row))
            own.reserve(own.length + new)


@dataclass
class Limit:
    """What all silos hold of one resource, sessions or bytes, and how much they may."""

    most: int
    silos: int
    size: Callable[[Session], int]
    """How much a session holds."""
    held: Counter[str] = field(default_factory=Counter)
    """By silo."""

    @property
    def share(self) -> int:
        """An equal part for each silo; 0 if there is less than one for each."""
        return self.most // self.silos

    def missing(self, more: int) -> int:
        """How much must be freed for this much more; at most 0 if nothing."""
        return self.held.total() + more - self.most

    def within(self, silo: str, more: int = 0) -> bool:
        """Whether the silo has no more than its share, with this much more."""
        return self.held[silo] + more <= max(self.share, 1)


class Sessions:
    """All sessions, least recently used first.

    At most ``trunk.sessions`` are held in ``trunk.session_bytes`` of memory, each for ``trunk.lease`` seconds after its
    last step. Each silo has an equal share of both. What others leave unused may be used by anyone, until a silo that
    stays within its share needs it: it takes from silos that exceed theirs, whether those sessions are in use or not,
    once they have had ``EVICTION_GRACE`` seconds to get somewhere (``LONG`` times that, if less than a share is left).

    Args:
        silos: number of silos of the recipe.
    """

    def __init__(
        self, runner: Runner, section: TrunkSection, silos: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runner = runner
        self._section = section
        self._silos = silos
        self._clock = clock
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def nbytes(self) -> int:
        """Bytes that the caches of all sessions take."""
        return sum(session.nbytes for session in self._sessions.values())

    def start(self, peer: str, request: pb.Decode) -> Session:
        """The session of this step, with the requested positions dropped and rows selected; step 0 creates it.

        Raises:
            UnknownSessionError: the session was evicted, expired or never existed; the silo must replay its frames.
            OutOfOrderError: the step is not the session's next one.
            FrameError: the positions or rows do not exist, or the session would exceed the model's context or the
                trunk's memory.
        """
        self.expire()
        key = (peer, request.session)
        session = self._find(key, request) if request.step else self._new(key, request)
        if request.step:
            self._rewind(session, request)
        try:
            self._check_size(session.bytes_for(request.lengths))
        except FrameError:
            self._sessions.pop(key, None)
            raise
        return session

    def admit(self, session: Session, lengths: Sequence[int]) -> bool:
        """Allocate memory for this many more tokens in each row; other sessions are evicted for it.

        Returns:
            Whether there is enough memory.

        Raises:
            UnknownSessionError: the session itself was evicted meanwhile.
        """
        known = self._sessions.get(session.key) is session
        if (session.step or session.busy) and not known:
            raise UnknownSessionError("the session was evicted", remedy="send its frames again from the first")
        if session.busy:
            return True
        if not self._make_room(session, session.bytes_for(lengths) - (session.nbytes if known else 0), int(not known)):
            return False
        session.grow(lengths)
        session.busy = True
        session.began = self._clock() if session.began is None else session.began
        self._sessions[session.key] = session
        return True

    def finish(self, session: Session, lengths: list[int]) -> None:
        """Record that a step is done and appended this many tokens to each row."""
        even = len(set(lengths)) == 1
        session.croppable = session.croppable + lengths[0] if even else min(lengths)
        session.step += 1
        session.busy = False
        session.last_used = self._clock()

    def close(self, peer: str, number: int) -> None:
        """Free a session, if it still exists."""
        self._sessions.pop((peer, number), None)

    def close_all(self, peer: str) -> None:
        """Free all sessions of this silo."""
        for key in [key for key in self._sessions if key[0] == peer]:
            del self._sessions[key]

    def _new(self, key: SessionKey, request: pb.Decode) -> Session:
        self._runner.check_context(list(request.lengths))
        blank = self._runner.new_cache(key[0])
        self._check_size(sum(map(blank.bytes_for, request.lengths)))  # before there is a cache of each row
        before = self._sessions.pop(key, None)
        rows = [self._runner.new_cache(key[0]) for _ in request.lengths]
        return Session(key, rows, self._clock(), began=None if before is None else before.began)

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self._section.session_bytes:
            raise FrameError(
                f"the session needs {nbytes} bytes; trunk.session_bytes allows {self._section.session_bytes}",
                remedy="ask for fewer or shorter sequences, or raise trunk.session_bytes",
            )

    def _find(self, key: SessionKey, request: pb.Decode) -> Session:
        session = self._sessions.get(key)
        if session is None:
            raise UnknownSessionError(
                f"no session {request.session} here", remedy="send its frames again from the first"
            )
        if request.step != session.step:
            raise OutOfOrderError(
                f"received step {request.step} of session {request.session}, expected step {session.step}",
                remedy="send each step once, in order",
            )
        self._sessions.move_to_end(key)
        session.last_used = self._clock()
        return session

    def _rewind(self, session: Session, request: pb.Decode) -> None:
        """Drop positions and select rows as the silo did in its own caches. Checks everything before any change."""
        kept = [row.length - request.forget for row in session.rows]
        if request.forget > session.croppable or max(kept) < 1:
            raise FrameError(
                f"cannot drop {request.forget} positions", remedy="drop at most the positions that all rows share"
            )
        rows = list(request.rows) or list(range(len(kept)))
        if max(rows) >= len(kept) or len(rows) != len(request.lengths):
            raise FrameError(
                f"cannot select rows {rows[:8]} of {len(kept)}", remedy="select existing rows, one length for each"
            )
        self._runner.check_context([kept[row] + new for row, new in zip(rows, request.lengths, strict=True)])
        for row, length in zip(session.rows, kept, strict=True):
            row.crop(length)
        session.croppable -= request.forget
        session.rows = [session.rows[row] for row in rows]

    def _make_room(self, session: Session, nbytes: int, sessions: int) -> bool:
        """Evict other sessions until this many more bytes and sessions fit. Never call it during a pass.

        Returns:
            Whether they fit; if not, no session was evicted.
        """
        silo, chosen = session.key[0], set()
        memory = Limit(self._section.session_bytes, self._silos, lambda one: one.nbytes)
        places = Limit(self._section.sessions, self._silos, lambda one: 1)
        for one in self._sessions.values():
            for limit in (memory, places):
                limit.held[one.key[0]] += limit.size(one)
        wanted = ((memory, nbytes), (places, sessions))
        for takes in (self._takes, self._clears):
            for key, one in sorted(self._sessions.items(), key=lambda item: item[1].busy):  # the others stay in order
                short = [(limit, more) for limit, more in wanted if limit.missing(more) > 0]
                if one is session or key in chosen or not any(takes(silo, *each, one) for each in short):
                    continue
                chosen.add(key)
                for limit in (memory, places):
                    limit.held[key[0]] -= limit.size(one)
        if any(limit.missing(more) > 0 for limit, more in wanted):
            return False
        for key in chosen:
            del self._sessions[key]
        return True

    def _takes(self, silo: str, limit: Limit, more: int, session: Session) -> bool:
        """Whether a silo that stays within its share takes this session from one that exceeds its own."""
        owner = session.key[0]
        if owner == silo or session.began is None or not limit.within(silo, more) or limit.within(owner):
            return False
        rest = limit.held[owner] - limit.size(session)
        return self._clock() - session.began >= EVICTION_GRACE * (1 if rest >= limit.share else LONG)

    def _clears(self, silo: str, limit: Limit, more: int, session: Session) -> bool:
        """Whether this session has been idle for so long that it makes room."""
        idle = self._clock() - session.last_used
        if session.busy or idle < EVICTION_GRACE:
            return False
        owner = session.key[0]
        return owner == silo or limit.held[owner] > limit.share or idle >= LONG * EVICTION_GRACE

    def expire(self) -> float | None:
        """Free the sessions whose lease is over. Returns the seconds until the next one's is; None: there is none."""
        now, lease = self._clock(), self._section.lease
        for key in [key for key, one in self._sessions.items() if one.last_used + lease < now and not one.busy]:
            del self._sessions[key]
        left = [one.last_used + lease - now for one in self._sessions.values() if not one.busy]
        return min(left) + 1e-3 if left else None  # past the end, not at it
