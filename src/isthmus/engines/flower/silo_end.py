"""A silo's end of Flower: the channel to the root of a worker that stays alive while messages come and go."""

from __future__ import annotations

import itertools
import json
import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from isthmus.engines.flower.courier.letters import Answering, Letter, Postbox
from isthmus.engines.flower.secured import Secured
from isthmus.errors import FrameError, IdentityError, IsthmusError, PeerGoneError, RoundLostError, RunError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, check_size, settle, welcome_of
from isthmus.wire.client import Pending
from isthmus.wire.identity import Identity

LINGER_SECONDS = 30.0
"""Longest time that a silo which has ended waits for Flower to fetch its last word."""
HOLD_SECONDS = 600.0
"""Longest time for which a letter of the root is held, whatever the courier asks for."""
log = logging.getLogger(__name__)


class FlowerChannel:
    """A channel to the root whose bytes Flower's messages carry. Implements ``wire.channel.Channel``.

    The root's letters are numbered from 1, and each is answered once, when the silo waits for the root again: with all
    that it has said until then. A letter that comes again is answered as before. One that does not follow the last, as
    after a restart of the root, is answered with the beginning of a new connection, on which, if the root goes on with
    it, the frames without an answer are sent again; the root answers each frame once.

    A round is one message, so an update waits for no answer of its own: it goes with the request for the next plan, and
    what the root says of both is heard together.

    Args:
        identity: this silo's.
        greeting: the first request of every connection.
        server: the name on the root's certificate.
        limit: largest frame in bytes.
    """

    def __init__(self, identity: Identity, greeting: Message, *, server: str = "root", limit: int = 64 * 2**20) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self.welcome = pb.Welcome()
        self.greeted: Answer = Answer()
        """The answer to the first greeting."""
        self._identity, self._greeting, self._server, self._limit = identity, greeting, server, limit
        self._name = secrets.token_hex(8)
        """Of this channel, over all its connections."""
        self._ids = itertools.count(1)
        self._changed = threading.Condition()
        """Guards all that follows; notified when some of it changes."""
        self._pending: dict[int, Pending] = {}
        self._awaited: dict[int, int] = {}
        """Ids of the answers that threads of the silo wait for, with the number of threads."""
        self._unconfirmed: Answer | None = None
        """The answer to an update that the silo did not wait for."""
        self._secured: Secured | None = None
        self._session, self._number = "", 0
        """The connection, and the number of its last letter."""
        self._next: Secured | None = None
        self._proposed = ""
        """A connection that the root has not gone on with yet."""
        self._reply: Letter | None = None
        """What answered that letter; None: it is held still."""
        self._turn = 0
        """Counts letters, so that one that is held ends when another comes."""
        self._ended: IsthmusError | None = None
        self._parting: str | None = None
        """Why the silo has ended before the federation; empty: it has not; None: that is not known yet."""
        self._told = False
        """Whether the root's side has been told that the silo has ended."""

    def submit(self, request: Message) -> Answer:
        with self._changed:
            if self._ended is not None:
                raise self._ended
            id = next(self._ids)
            data = frames.wrap(request, id=id, acked=next(iter(self._pending), id) - 1).SerializeToString()
            check_size(len(data), self._limit)
            answer: Answer = _Awaited(self, id)
            self._pending[id] = Pending(data, type(request), answer, not frames.waits_for_others(request))
            self._send(data)
            return answer

    def call(self, request: Message) -> Any:
        unconfirmed, self._unconfirmed = self._unconfirmed, None
        answer = self.submit(request)
        if isinstance(request, pb.Reveal) or (isinstance(request, pb.Update) and not request.masked):
            self._unconfirmed = answer
            return pb.Accepted()
        if unconfirmed is not None:
            _hear(unconfirmed, answer)
        return answer.result()

    def close(self) -> None:
        with self._changed:
            if self._ended is None:
                self._end(PeerGoneError("the channel to the root was closed on this side", remedy="open a new channel"))

    def part(self, failure: str = "") -> None:
        """Close the channel, and wait until Flower has fetched how the silo has ended.

        Args:
            failure: why, in words that may leave the silo; empty: the federation has finished.
        """
        self.close()
        with self._changed:
            self._parting = failure
            self._changed.notify_all()
            if self._session or self._proposed:
                self._changed.wait_for(lambda: self._told, LINGER_SECONDS)

    def exchange(self, letter: Letter) -> Letter:
        """The answer to a letter of the root. One of no known session is answered with the beginning of another.

        Held until the silo waits for the root, or for ``hold`` seconds.
        """
        asked = letter.head
        if asked.get("silo", self._identity.name) != self._identity.name:
            return self._letter(-1, b"", refused=f"the worker at this socket is {self._identity.name}'s")
        with self._changed:
            if self._over():
                return self._last_word()
            session, number = asked.get("session", ""), asked.get("number", 0)
            if session and session == self._proposed and number == 1:
                self._adopt()
            if not session or session != self._session or number not in (self._number, self._number + 1):
                return self._propose()
            if number == self._number and self._reply is not None:
                return self._reply
            if number == self._number + 1:
                self._number, self._reply = number, None
                self._accept(b"".join(letter.bodies))
            return self._held(min(float(asked.get("hold", 0.0)), HOLD_SECONDS))

    def _held(self, seconds: float) -> Letter:
        """The answer to the connection's last letter, once there is something to say, or after so long."""
        self._turn += 1
        turn = self._turn
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._turn != turn or self._over() or self._quiet(), seconds)
        if self._over():
            return self._last_word()
        if self._turn != turn:
            return self._letter(-1, b"", refused="another letter came meanwhile")
        assert self._secured is not None
        self._reply = self._letter(self._number, self._secured.outgoing(), awaits=self._awaits())
        return self._reply

    def speaks(self) -> bool:
        """Whether a letter now would be answered at once, with something."""
        with self._changed:
            return self._over() or self._quiet()

    @contextmanager
    def awaiting(self, id: int) -> Iterator[None]:
        """While the block runs, a thread of the silo waits for the answer to this request."""
        with self._changed:
            self._awaited[id] = self._awaited.get(id, 0) + 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._awaited[id] -= 1
                if not self._awaited[id]:
                    del self._awaited[id]

    def _over(self) -> bool:
        return self._ended is not None

    def _awaits(self) -> list[int]:
        """Ids of the answers without which the silo does not go on, 0 for that to its greeting; none: it works."""
        if self._secured is None or not self._secured.established:
            return [0]
        return sorted(id for id in self._awaited if id in self._pending)

    def _quiet(self) -> bool:
        """Whether the silo has nothing to say before the root answers."""
        return bool(self._awaits())

    def _propose(self) -> Letter:
        """The beginning of a connection. The last one stays until the root goes on with this: whoever brings a letter
        may come from a node that the root refuses."""
        self._identity = self._identity.renewed()
        self._next = Secured(self._identity, server=self._server, limit=self._limit)
        self._proposed = secrets.token_hex(8)
        return self._letter(0, self._next.outgoing(), session=self._proposed, awaits=[0])

    def _adopt(self) -> None:
        """Go on with the connection that was proposed last."""
        self._secured, self._session, self._number, self._reply = self._next, self._proposed, 0, None
        self._next, self._proposed = None, ""
        self._send(json.dumps({"instance": self._name}).encode())
        self._send(frames.wrap(self._greeting).SerializeToString())
        for one in self._pending.values():
            self._send(one.data)

    def _send(self, data: bytes) -> None:
        if self._secured is not None:
            self._secured.send(data)
            self.sent_bytes += len(data)
            self._changed.notify_all()

    def _accept(self, data: bytes) -> None:
        """Settle the answers in bytes of the root."""
        assert self._secured is not None
        try:
            for message in self._secured.receive(data):
                self.received_bytes += len(message)
                self._settle(frames.parse(message))
        except IdentityError as error:
            self._end(error)
        except FrameError as error:
            log.warning("a letter of the root cannot be read: %s; connecting again", error.message)
            self._session = ""

    def _settle(self, frame: pb.Frame) -> None:
        if frame.id == 0:
            verdict: Answer = Answer()
            settle(verdict, frame, type(self._greeting))
            try:
                self.welcome = welcome_of(verdict.result())
            except IsthmusError as error:
                self._end(error)
            else:
                if not self.greeted.done():
                    self.greeted.set_result(verdict.result())
        elif (known := self._pending.pop(frame.id, None)) is not None:
            settle(known.answer, frame, known.kind)

    def _end(self, error: IsthmusError) -> None:
        self._ended = error
        pending, self._pending = self._pending, {}
        self._changed.notify_all()
        for one in pending.values():
            one.answer.set_exception(error)
        if not self.greeted.done():
            self.greeted.set_exception(error)

    def _letter(self, number: int, body: bytes, **said: Any) -> Letter:
        head = {"silo": self._identity.name, "session": self._session, "number": number}
        return Letter(head | said, (body,))

    def _last_word(self) -> Letter:
        self._changed.wait_for(lambda: self._parting is not None, LINGER_SECONDS)
        self._told = True
        self._changed.notify_all()
        body = b"" if self._secured is None else self._secured.outgoing()
        return self._letter(self._number, body, over=True, failure=self._parting or "")


class _Awaited(Answer):
    """An answer that tells its channel when a thread waits for it."""

    def __init__(self, channel: FlowerChannel, id: int) -> None:
        super().__init__()
        self._channel, self._id = channel, id

    def result(self, timeout: float | None = None) -> Message:
        with self._channel.awaiting(self._id):
            return super().result(timeout)


@contextmanager
def at_socket(channel: FlowerChannel, path: Path) -> Iterator[None]:
    """Answer the courier's letters at this socket while the block runs. An error that ends it is told by its kind.

    Raises:
        RunError: there can be no socket.
    """
    with listening(path, channel.exchange):
        log.info("waiting for Flower at %s", path)
        try:
            yield
        except BaseException as error:
            with suppress(IsthmusError):
                channel.part(f"{type(error).__name__}; its log says more")
            raise
        channel.part()


@contextmanager
def listening(path: Path, answer: Answering) -> Iterator[None]:
    """A postbox at this path.

    Raises:
        RunError: there can be none.
    """
    try:
        postbox = Postbox(path, answer)
    except OSError as error:
        raise RunError(
            f"cannot listen at {path}: {error}",
            remedy="name a path of at most 100 characters that no other process has",
        ) from error
    with postbox:
        yield


def _hear(unconfirmed: Answer, following: Answer) -> None:
    """Hear what the root said of an update. That it came too late is no error any more: the next plan says what is.

    Args:
        following: the answer that the silo waits for; the other has come when this has.
    """
    with suppress(Exception):
        following.result()
    if not unconfirmed.done():
        return
    try:
        unconfirmed.result()
    except RoundLostError as lost:
        log.warning("the round went on without this silo: %s", lost.message)
