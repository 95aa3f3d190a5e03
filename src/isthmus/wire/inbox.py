"""What a server holds for one peer of a service: requests being answered, and answers until they are received.

Everything is bounded in bytes. A peer whose requests and unsent answers have reached the bound is not read from until
answers have gone out; of the answers that have gone out, the last ones are kept in case a stream breaks.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from isthmus.errors import IsthmusError, ProtocolError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Service, answer_request
from isthmus.wire.chunks import FLOW
from isthmus.wire.traffic import PeerTraffic, Traffic

FRAMES = 4
"""Largest frames that requests being answered and unsent answers of a peer may have together."""
LEAST = 16 * 2**20
"""The same in bytes, if frames are small."""
KEPT = 0.75
"""Share of that for answers that were sent. A stream that breaks loses two of the largest frames (one that is being
sent, one that is not read to its end) and what the network holds on its way."""
REFUSAL = 4096
"""Bytes of a frame that may be an error: messages are short."""
COST = 1024
"""Bytes that a request or an answer counts beside its frame's: what Python needs to keep it."""
MAX_INSTANCES = 2
"""Clients of one peer that a server of a service knows at a time, each with one stream."""
VISITOR, VISITORS = "visit-", 1
"""Begins the name of a client that asks and goes, as a doctor's; so many of a peer are known beside its others, which
keep their answers and place."""
REMEMBERED = 64
"""Names of clients that had to make room for newer ones, to be refused should they return."""
BEAT_SECONDS = 5.0
"""Time after which a client that waits for room is told that the server lives."""
BEAT = frames.wrap(pb.Pong(), id=2**64 - 1).SerializeToString()
"""An answer to no request, which clients pass over."""
EXAMPLES = "examples"
"""The kind of a forward that names kept examples: a small request with a large answer."""
log = logging.getLogger(__name__)


class Stream:
    """One connection: what is to be sent on it, until it ends. Its inbox's account guards it.

    Args:
        cancel: ends the connection.
    """

    def __init__(self, cancel: Callable[[], object]) -> None:
        self.cancel = cancel
        self.replaced = False
        """Whether a newer stream has taken its place: nothing is read or sent any more."""
        self.ended = False
        """Whether nothing more is read; what is ready is still sent."""
        self.error: IsthmusError | None = None
        """Why the server ends it."""
        self.read = threading.Event()
        """Set once no thread passes requests of this stream to the service."""
        self.waiting: set[int] = set()
        """Ids that came on this stream and whose answers have not been sent on it."""
        self.ready: deque[int] = deque()
        """Those of them that can be sent."""
        self.greeting: bytes | None = None
        """The answer to the greeting, to be sent before all others."""
        self.beat = False
        self.flows = False
        """Whether the client is to be told that a chunk has come."""


class PeerAccount:
    """What all clients of one peer hold of a service.

    Args:
        limit: largest frame in bytes.
        grace: seconds after which the answers to a client without a stream are freed.
    """

    def __init__(self, service: Service, peer: str, limit: int, grace: float) -> None:
        self.service, self.peer, self.limit, self.grace = service, peer, limit, grace
        self.bound = max(FRAMES * limit, LEAST)
        self.kept = int(KEPT * self.bound)
        self.changed = threading.Condition()
        """Guards account, inboxes and streams. Nothing is called under it that may take another lock: a service
        that handles one peer's request may settle another's, in the same thread."""
        self.open = 0
        """Bytes of the requests being answered."""
        self.expected = 0
        """Bytes that their answers are expected to have."""
        self.greeting = False
        """Whether a greeting is being answered. One is at a time, whatever room there is: a stream begins with it."""
        self.traffic = Traffic(peer)
        self._ratios: dict[str, float] = {}
        self._inboxes: dict[str, Inbox] = {}
        self._refused: deque[str] = deque(maxlen=REMEMBERED)

    @property
    def held(self) -> int:
        """Bytes held: requests being answered, and answers unsent or kept."""
        with self.changed:
            return self.open + sum(inbox.held for inbox in self._inboxes.values())

    def seen(self, service: str) -> PeerTraffic:
        """What the peer has sent and got of this service."""
        held = self.held
        with self.changed:
            connected = any(inbox.stream is not None for inbox in self._inboxes.values())
            return self.traffic.seen(service, connected=connected, held_bytes=held)

    def connect(self, instance: str, stream: Stream) -> tuple[Inbox, list[Stream]]:
        """The inbox of a client, which has this stream from now on, and the streams that must be ended for it: the
        client's last one and, if there are too many clients, that of one without a stream or else of the oldest.

        Raises:
            ProtocolError: the client is one that had to make room.
        """
        with self.changed:
            if instance in self._refused:
                raise ProtocolError(
                    f"newer processes of {self.peer} have connected since",
                    remedy="stop the other processes that use this certificate",
                )
            visits = instance.startswith(VISITOR)
            if instance not in self._inboxes and not visits:
                for other in self._inboxes.values():
                    if other.stream is None:  # of a process that is gone, most likely
                        other.free()
            inbox = self._inboxes.pop(instance, None) or Inbox(self)
            self._inboxes[instance] = inbox
            ended = [inbox.replace(stream)]
            alike = [name for name in self._inboxes if name.startswith(VISITOR) == visits]
            if len(alike) > (VISITORS if visits else MAX_INSTANCES):
                oldest = min(alike, key=lambda name: self._inboxes[name].stream is not None)  # the first such
                self._refused.append(oldest)
                ended.append(self._inboxes.pop(oldest).replace(None))
            self.changed.notify_all()
            return inbox, [one for one in ended if one is not None]

    def expect(self, kind: str, size: int) -> int:
        """Bytes that the answer to such a request may have, judged by the largest so far."""
        ratio = self._ratios.get(kind)
        if ratio is None:
            return self.limit if kind == EXAMPLES else max(size, self.limit // 16)
        return min(self.limit, math.ceil(ratio * size))

    def learn(self, kind: str, size: int, answer: bytes) -> None:
        """Note how large the answer to such a request was; errors are no measure, and are counted."""
        parsed = frames.parse(answer) if len(answer) <= REFUSAL else None
        if parsed is not None and parsed.HasField("failure"):
            self.traffic.refuse(kind, parsed.failure.code)
        else:
            self._ratios[kind] = max(self._ratios.get(kind, 0.0), len(answer) / max(size, 1))


class Inbox:
    """The requests of one client to one service. Each is handled once; one that comes again gets the same answer.

    Requests wait while those being answered, and the answers that are not sent, reach the account's bound. Answers
    that nevertheless exceed it are replaced by ``ProtocolError``. Of the answers sent, the last ones are kept,
    ``KEPT`` of the bound, until they are acknowledged; one that is asked for later is a ``ProtocolError``.
    """

    def __init__(self, account: PeerAccount) -> None:
        self._account = account
        self.peer = account.peer
        self._unsent: dict[int, bytes] = {}
        self._sent: dict[int, bytes] = {}
        self.unsent_bytes = 0
        self.sent_bytes = 0
        self._open: dict[int, int] = {}
        """Ids of requests being answered, and how many bytes their answers are expected to have."""
        self._last = 0
        self._acked = 0
        self._gone = False
        self._warned = False
        self._timer: threading.Timer | None = None
        self.stream: Stream | None = None

    @property
    def held(self) -> int:
        """Bytes of all answers; under the account's lock."""
        greeting = (self.stream and self.stream.greeting) or b""
        return self.unsent_bytes + self.sent_bytes + len(greeting)

    def receive(self, data: bytes, stream: Stream) -> None:
        """Pass a request to the service, or find its answer; wait for room first. Called by one thread at a time.

        Raises:
            FrameError: the bytes are not a frame.
        """
        account, frame = self._account, frames.parse(data)
        id, acked, size = frame.id, frame.acked, len(data)
        kind = EXAMPLES if frame.forward.examples else frame.WhichOneof("body") or ""
        parsed: pb.Frame | None = frame
        del frame
        with account.changed:
            self._acknowledge(acked)
            known = 0 < id <= self._last

            def room() -> bool:
                if known:
                    return len(stream.waiting) * COST <= account.bound
                if id == 0:
                    return not account.greeting and stream.greeting is None
                return self._fits(size + COST + account.expect(kind, size))

            if not room():
                parsed = None  # it may be many times as large as its bytes
                self._wait(stream, room)
            if known:
                self._send_again(id, stream)
                return
            if stream.replaced:
                return
            account.traffic.came(kind, size)
            expected = account.expect(kind, size)
            account.open += size + COST
            account.expected += expected
            self._open[id] = expected
            if id:
                self._last = id
                stream.waiting.add(id)
            else:
                account.greeting = True
        answer = answer_request(account.service, account.peer, parsed or frames.parse(data))
        answer.add_done_callback(lambda done: self._finish(id, kind, size, stream, done))

    def next(self, stream: Stream) -> bytes | None:
        """Wait for the next frame to send on this stream; None: it has ended."""
        with self._account.changed:
            while not stream.replaced:
                if stream.greeting is not None:
                    data, stream.greeting = stream.greeting, None
                    self._account.traffic.sent_bytes += len(data)
                    self._account.changed.notify_all()
                    return data
                if stream.ready:
                    sendable = self._take(stream.ready.popleft(), stream)
                    self._account.changed.notify_all()
                    if sendable is not None:
                        self._account.traffic.sent_bytes += len(sendable)
                        return sendable
                elif stream.ended:
                    return None
                elif stream.flows:
                    stream.flows = False
                    return FLOW
                elif stream.beat:
                    stream.beat = False
                    return BEAT
                else:
                    self._account.changed.wait()
            return None

    def tell_flow(self, stream: Stream) -> None:
        """Tell the client that bytes of a large frame have come."""
        with self._account.changed:
            stream.flows = True
            self._account.changed.notify_all()

    def replace(self, stream: Stream | None) -> Stream | None:
        """Send on this stream from now on, or never again; under the account's lock. Returns the last one."""
        last, self.stream = self.stream, stream
        if last is not None:
            last.replaced = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._gone = False
        if stream is None:
            self.free()
        return last

    def end(self, stream: Stream, error: IsthmusError | None) -> None:
        """Nothing more is read from the stream. It ends once what is ready is sent, with this error if there is one."""
        with self._account.changed:
            stream.ended, stream.error = True, stream.error or error
            self._account.changed.notify_all()

    def leave(self, stream: Stream) -> None:
        """The stream is over. If the client comes with no other in time, its answers are freed."""
        with self._account.changed:
            stream.replaced = True
            if self.stream is stream:
                self.stream = None
                self._timer = threading.Timer(self._account.grace, self._expire, (stream,))
                self._timer.daemon = True
                self._timer.start()
            self._account.changed.notify_all()

    def free(self) -> None:
        """Forget all answers, also those to come until there is another stream; under the account's lock."""
        self._gone = True
        self._account.expected -= sum(self._open.values())
        self._open = dict.fromkeys(self._open, 0)
        self._unsent.clear()
        self._sent.clear()
        self.unsent_bytes = self.sent_bytes = 0

    def _expire(self, last: Stream) -> None:
        with self._account.changed:
            if self._timer is not None and last in self._timer.args:
                self._timer = None  # it holds this inbox
                self.free()

    def _wait(self, stream: Stream, condition: Callable[[], bool]) -> None:
        while not stream.replaced and not condition():
            if not self._account.changed.wait(BEAT_SECONDS):
                stream.beat = True
                self._account.changed.notify_all()

    def _fits(self, size: int) -> bool:
        """Whether there is room for so much more; for one request there always is."""
        held = self._account.open + self._account.expected + self.unsent_bytes
        return held == 0 or held + size <= self._account.bound

    def _acknowledge(self, acked: int) -> None:
        acked = min(acked, self._last)
        count = acked - self._acked
        if count <= 0:
            return
        if count <= len(self._unsent) + len(self._sent):
            received = list(range(self._acked + 1, acked + 1))
        else:
            received = [id for id in (*self._unsent, *self._sent) if id <= acked]
        self._acked = acked
        for id in received:
            if (data := self._unsent.pop(id, None)) is not None:
                self.unsent_bytes -= len(data) + COST
            if (data := self._sent.pop(id, None)) is not None:
                self.sent_bytes -= len(data) + COST
        self._account.changed.notify_all()

    def _send_again(self, id: int, stream: Stream) -> None:
        if id > self._acked and id not in stream.waiting and not stream.replaced:
            stream.waiting.add(id)
            if id not in self._open:
                stream.ready.append(id)
                self._account.changed.notify_all()

    def _finish(self, id: int, kind: str, size: int, stream: Stream, done: Future[bytes]) -> None:
        data, account = done.result(), self._account
        with account.changed:
            account.open -= size + COST
            account.expected -= self._open.pop(id)
            account.learn(kind, size, data)
            if id == 0:
                account.greeting = False
                if not stream.replaced:
                    stream.greeting = data
            elif id > self._acked and not self._gone:
                self._add(id, data)
            account.changed.notify_all()

    def _add(self, id: int, data: bytes) -> None:
        if self.unsent_bytes + len(data) + COST > self._account.bound:
            if not self._warned:
                self._warned = True
                log.warning("%s does not read its answers; some are dropped", self.peer)
            data = _refusal(
                id,
                f"more than {self._account.bound:,} bytes of answers are not read",
                "read the answers, or ask for less at a time",
            )
        self._unsent[id] = data
        self.unsent_bytes += len(data) + COST
        if self.stream is not None and id in self.stream.waiting:
            self.stream.ready.append(id)

    def _take(self, id: int, stream: Stream) -> bytes | None:
        """The answer, which is sent now; None if the client has it."""
        stream.waiting.discard(id)
        if id <= self._acked:
            return None
        if (data := self._unsent.pop(id, None)) is not None:
            self.unsent_bytes -= len(data) + COST
            self.sent_bytes += len(data) + COST
        else:
            data = self._sent.pop(id, None)
        if data is None:
            return _refusal(id, f"the answer to request {id} is not kept any more", "start this process again")
        self._sent[id] = data
        while self.sent_bytes > self._account.kept and len(self._sent) > 1:
            self.sent_bytes -= len(self._sent.pop(next(iter(self._sent)))) + COST
        return data


def _refusal(id: int, message: str, remedy: str) -> bytes:
    return frames.wrap(frames.failure(ProtocolError(message, remedy=remedy)), id=id).SerializeToString()
