"""The gRPC channel: one persistent stream to a service, reconnected when it breaks; unanswered frames are sent
again."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from isthmus.errors import FrameError, FrameSizeError, IdentityError, IsthmusError, PeerGoneError, ProtocolError
from isthmus.recipe.address import checked_address, is_loopback
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, check_size, settle, welcome_of
from isthmus.wire.chunks import FLOW_ID, Assembler, in_chunks
from isthmus.wire.identity import Identity
from isthmus.wire.inbox import VISITOR
from isthmus.wire.server import INSTANCE_KEY, KEEPALIVE, METHOD_PATH

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Variables of the environment that name a proxy, in gRPC's order."""
EXEMPT = ("no_grpc_proxy", "no_proxy")
"""Variables that name hosts to be reached without one, likewise."""
PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds between attempts to connect; the last one repeats."""
SAID_SECONDS = 60.0
"""Time between two lines of who waits without end for a server."""
SMALL = 256
"""Bytes of a frame that takes no time on a slow line. That such a one goes does not show that the server is alive."""
log = logging.getLogger(__name__)
_DISTRUST = (
    "CERTIFICATE_",
    "BAD_SIGNATURE",
    "_ALERT_",
    "certificate verify failed",
    "Peer name",
    "Hostname Verification",
)
"""What is in gRPC's words if one side does not trust the other. A failed handshake alone may be a proxy's: one that
answers for a server that restarts speaks no TLS."""
_FATAL: dict[grpc.StatusCode, tuple[type[IsthmusError], str]] = {
    grpc.StatusCode.PERMISSION_DENIED: (IdentityError, "use the certificate of a silo in the recipe"),
    grpc.StatusCode.UNAUTHENTICATED: (IdentityError, "use a certificate of this federation"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        FrameSizeError,
        "send less at a time, or raise wire.max_frame_bytes on both sides",
    ),
    grpc.StatusCode.INVALID_ARGUMENT: (FrameError, "both sides must run the same version of isthmus"),
    grpc.StatusCode.FAILED_PRECONDITION: (ProtocolError, "stop the other processes that use this certificate"),
    grpc.StatusCode.UNIMPLEMENTED: (
        PeerGoneError,
        "another program listens at this address; correct the address in the recipe",
    ),
}


@dataclass(frozen=True)
class Pending:
    """A request without an answer."""

    data: bytes
    """Its frame."""
    kind: type[Message]
    answer: Answer
    due: bool
    """Whether its answer waits for no other party."""


class GrpcChannel:
    """A channel over gRPC with mTLS.

    Frames without an answer when the stream breaks are sent again, byte for byte, on the next stream; the server
    answers each id once. After ``deadline`` seconds without a connection all pending requests fail; so they do when a
    server that holds the connection has not answered the greeting by then, or is silent for as long, a ping unanswered.
    A request that waits for no other party fails alone if, of those, it is the oldest for ``answer_deadline`` seconds
    of connection, whatever else the server answers and however often it breaks the stream. Requests that wait for
    others may take any time, as long as pings are answered.

    An ``endless`` channel does not end for want of a server: it gives up a connection on which the server is silent,
    opens another, and goes on until the server is there, saying now and then who is waited for.

    Of a server with ``replicas`` a channel keeps to one while it can be reached, and turns to the next, with what was
    not answered, when it is gone or silent. One that refuses this party, or that it does not accept, is left out; the
    last one's refusal ends the channel.

    Args:
        address: ``host:port`` of the server.
        service: ``Trunk`` or ``Root``.
        identity: this party's identity.
        replicas: addresses of further servers of the same name, any of which will do. The party's own name says with
            which of all it begins.
        server: the name on the server's certificate; None: the service's name in lower case.
        greeting: the first request on every stream; an error in answer ends the channel.
        visits: whether this client asks and goes, and no other of its party has to make room for it.
        accept: called with the answer to the greeting on every stream; an ``IsthmusError`` that it raises ends the
            channel. None: every answer is accepted.
        deadline: seconds to keep trying to connect, and to wait for a silent server.
        answer_deadline: seconds for the answer to a request that waits for no other party.
        endless: keep trying until the server is there.
        limit: largest frame in bytes.

    Raises:
        RecipeError: an address is no ``host:port``.
        IdentityError, MismatchError, PeerGoneError: the first connection failed.
    """

    def __init__(
        self,
        address: str,
        service: str,
        identity: Identity,
        *,
        replicas: Sequence[str] = (),
        server: str | None = None,
        greeting: Message | None = None,
        visits: bool = False,
        accept: Callable[[pb.Welcome], None] | None = None,
        deadline: float = 60.0,
        answer_deadline: float = 600.0,
        endless: bool = False,
        limit: int = 64 * 2**20,
    ) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self.welcome = pb.Welcome()
        self._accept = accept
        self._addresses = deque(map(checked_address, (address, *replicas)))
        """Those not left out, the one in use first."""
        self._addresses.rotate(-own_replica(identity.name, len(self._addresses)))
        self._service = service
        self._server = server or service.lower()
        self._deadline, self._answer_deadline, self._endless = deadline, answer_deadline, endless
        self._limit = limit
        self._greet: Message = greeting or pb.Ping()
        self._metadata = ((INSTANCE_KEY, (VISITOR if visits else "") + secrets.token_hex(8)),)
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._pending: dict[int, Pending] = {}
        self._oldest: tuple[int | None, float] = None, 0.0
        """Id of the oldest request that is due, and the seconds of connection for which it is the oldest."""
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._ended: IsthmusError | None = None
        self._over = threading.Event()
        """Set at the channel's end."""
        self._moved = time.monotonic()
        """When a frame last came, one of more than ``SMALL`` bytes went, or the first request began to wait."""
        self._opened: float | None = None
        """When the stream was opened whose greeting is not answered yet."""
        self._greeting_answered = False
        """Whether the greeting of the open stream is answered."""
        self._flowed = False
        """Whether bytes of a frame in several chunks went or came since the last look at what is overdue."""
        self._dead = False
        """Whether the connection is to be replaced: the server is silent on it."""
        self._identity = identity
        self._call: Any = None
        self._grpc = self._connected()
        self._greeted: Answer = Answer()
        threading.Thread(target=self._keep_streaming, name=f"to {service}", daemon=True).start()
        threading.Thread(target=self._keep_listening, name=f"silence of {service}", daemon=True).start()
        self._greeted.result()

    @property
    def address(self) -> str:
        """Of the server in use."""
        return self._addresses[0]

    def stay(self) -> None:
        """Turn to no replica any more."""
        self._addresses = deque([self.address])

    def greet_with(self, greeting: Message) -> None:
        """Begin every later stream with this request."""
        self._greet = greeting

    def submit(self, request: Message) -> Answer:
        answer: Answer = Answer()
        with self._lock:
            if self._ended is not None:
                raise self._ended
            id = next(self._ids)
            acked = next(iter(self._pending), id) - 1
            data = frames.wrap(request, id=id, acked=acked).SerializeToString()
            check_size(len(data), self._limit)
            if not self._pending:
                self._moved = time.monotonic()
            self._pending[id] = Pending(data, type(request), answer, not frames.waits_for_others(request))
            self.sent_bytes += len(data)
            self._outbox.put(data)
        return answer

    def call(self, request: Message) -> Any:
        return self.submit(request).result()

    def close(self) -> None:
        self._end(PeerGoneError(f"the channel to {self._service} was closed on this side", remedy="open a new channel"))
        self._grpc.close()

    def _connected(self) -> grpc.Channel:
        return grpc.secure_channel(self.address, self._identity.client_credentials(), options=self._options())

    def _renewed(self) -> bool:
        """Whether this party has another certificate than this channel shows."""
        return self._identity.renewed().certificate != self._identity.certificate

    def _renew(self) -> None:
        """Use this party's new certificate from the next stream on, if it has one, and another connection in place of
        a dead one."""
        if self._renewed():
            identity = self._identity.renewed()
            log.info("the certificate of %s was renewed; connecting to %s again", identity.name, self._server)
            self._identity = identity
        elif not self._dead:
            return
        self._dead = False
        self._grpc.close()
        self._grpc = self._connected()

    def _options(self) -> tuple[tuple[str, Any], ...]:
        return (
            ("grpc.ssl_target_name_override", self._server),
            ("grpc.enable_http_proxy", int(not is_loopback(self.address))),  # no proxy knows this machine's localhost
            ("grpc.max_receive_message_length", self._limit + 1024),
            ("grpc.max_send_message_length", self._limit + 1024),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            *KEEPALIVE,
        )

    def _turn(self) -> None:
        """Use the next server's address from the next stream on."""
        if len(self._addresses) > 1:
            left = self.address
            self._addresses.rotate(-1)
            self._dead = True
            log.warning("no connection to %s at %s; turning to %s", self._server, left, self.address)

    def _keep_streaming(self) -> None:
        last_contact, said, reason, tried = time.monotonic(), 0.0, "", 0
        pauses = itertools.chain(PAUSES, itertools.repeat(PAUSES[-1]))
        while self._ended is None:
            received = self.received_bytes
            self._renew()
            try:
                self._stream()
                error: IsthmusError | None = None
            except grpc.RpcError as broken:
                error, reason = self._fatal(broken), f": {(broken.details() or '')[:200]}"
            except FrameError as malformed:
                error = malformed
            if self.received_bytes > received:
                last_contact, said, tried = time.monotonic(), 0.0, 0
                pauses = itertools.chain(PAUSES, itertools.repeat(PAUSES[-1]))
            elif error is None and not self._dead:  # else another one is next already
                tried += 1
                self._turn()
            waited = time.monotonic() - last_contact
            if error is not None:
                self._refused(error)
            elif waited > self._deadline and not self._endless:
                self._end(self._unreachable(waited, reason))
            elif self._ended is None and not self._renewed() and tried % len(self._addresses) == 0:
                if (pause := next(pauses)) == PAUSES[0] or waited - said > SAID_SECONDS:
                    said = waited
                    self._say_waiting(waited, reason)
                self._over.wait(pause)

    def _refused(self, error: IsthmusError) -> None:
        """End the channel with this error of the server in use, or leave that server out if there are others. Another
        process of this party has taken its place at all of them."""
        if len(self._addresses) == 1 or isinstance(error, ProtocolError):
            self._end(error)
            return
        left = self._addresses.popleft()
        self._dead = True
        log.warning("the %s at %s is left out: %s; turning to %s", self._server, left, error.message, self.address)

    def _say_waiting(self, waited: float, reason: str) -> None:
        if not self._endless:
            log.warning("no connection to %s at %s; trying for %.0f s", self._server, self.address, self._deadline)
        elif waited < PAUSES[-1]:
            log.warning("no connection to %s at %s; waiting until it is there", self._server, self.address)
        else:
            log.warning(
                "no connection to %s at %s%s for %.0f s; still waiting%s",
                self._server,
                self.address,
                proxy_note(self.address),
                waited,
                reason,
            )

    def _unreachable(self, waited: float, reason: str) -> PeerGoneError:
        proxy = proxy_note(self.address)
        return PeerGoneError(
            f"no connection to {self._server} at {' or '.join(self._addresses)}{proxy} for {waited:.0f} s{reason}",
            remedy="start it again, check its address in the recipe and both certificates, then resume the run"
            + ("; if no proxy is needed for this host, name it in no_proxy" if "through" in proxy else ""),
        )

    def _stream(self) -> None:
        """Open a stream, send the greeting and all unanswered frames, then settle answers until the stream ends."""
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        greeting, received = self._greet, Assembler(self._limit + 1024)
        outbox.put(frames.wrap(greeting).SerializeToString())
        self._opened = self._moved = time.monotonic()
        with self._lock:
            for one in self._pending.values():
                outbox.put(one.data)
            self._outbox = outbox
        open_stream = self._grpc.stream_stream(METHOD_PATH.format(self._service), None, None)  # raw bytes both ways
        self._call = open_stream(self._drain(outbox), metadata=self._metadata)
        try:
            for data in self._call:
                self._moved = time.monotonic()
                if (whole := received.add(data)) is None:
                    self._flowed = True
                else:
                    self.received_bytes += len(whole)
                    self._receive(frames.parse(whole), type(greeting))
                    if self._dead:  # the greeting's answer says no; what follows it is of a server that is left out
                        break
        finally:
            self._opened, self._greeting_answered = None, False
            outbox.put(None)
            self._call.cancel()

    def _drain(self, outbox: queue.SimpleQueue[bytes | None]) -> Iterator[bytes]:
        while (data := outbox.get()) is not None:
            for chunk in in_chunks(data):
                if len(chunk) > SMALL:
                    self._moved = time.monotonic()
                self._flowed |= len(chunk) < len(data)
                yield chunk

    def _keep_listening(self) -> None:
        """End the channel, or an endless one's connection, if the server is silent: it may hold the connection and
        answer nothing."""
        asked, interval = 0.0, min(self._deadline, self._answer_deadline) / 8
        while not self._over.wait(interval):
            self._fail_overdue(interval)
            if self._call is not None and self._renewed():
                self._call.cancel()  # the next stream shows the new certificate
            now, opened, moved = time.monotonic(), self._opened, self._moved
            waits = bool(self._pending) or opened is not None
            silent = now - (opened if opened is not None else moved)
            if not waits or silent < self._deadline / 2:
                continue
            if silent > self._deadline:
                self._give_up(silent)
            elif opened is None and asked != moved:
                with suppress(IsthmusError):  # ended meanwhile
                    self.submit(pb.Ping())
                asked = moved

    def _give_up(self, silent: float) -> None:
        """End the channel for this silence; of an endless one, or one with replicas, the connection, after which
        another is opened."""
        if not self._endless and len(self._addresses) == 1:
            self._end(self._silence(silent))
            self._grpc.close()
        elif (self._opened is not None or self._greeting_answered) and not self._dead:
            log.warning("%s; connecting again", self._silence(silent).message)
            self._turn()
            self._dead = True
            self._call.cancel()

    def _fail_overdue(self, seconds: float) -> None:
        """Fail the oldest request that is due if it is that for too long. The channel goes on.

        Args:
            seconds: since the last look. They count where there is a connection, from when bytes of a large frame last
                moved.
        """
        with self._lock:
            oldest = next((id for id, one in self._pending.items() if one.due), None)
            if oldest is None or oldest != self._oldest[0] or self._flowed:
                self._flowed = False
                self._oldest = oldest, 0.0
                return
            waited = self._oldest[1] + (seconds if self._greeting_answered else 0.0)
            self._oldest = oldest, waited
            if waited <= self._answer_deadline:
                return
            late = self._pending.pop(oldest)
        late.answer.set_exception(
            PeerGoneError(
                f"{self._server} at {self.address} is there, but has not answered {late.kind.__name__} for "
                f"{waited:.0f} s, which waits for no other party",
                remedy="start it again and resume the run; if it has so much to compute, raise wire.answer_deadline",
            )
        )

    def _silence(self, seconds: float) -> PeerGoneError:
        return PeerGoneError(
            f"{self._server} at {self.address} holds the connection, but has not answered for {seconds:.0f} s",
            remedy="start it again and resume the run; if the network is slow, raise wire.deadline",
        )

    def _receive(self, frame: pb.Frame, greeting: type[Message]) -> None:
        if frame.id == 0:
            self._welcomed(frame, greeting)
            return
        with self._lock:
            known = self._pending.pop(frame.id, None)
            self._flowed |= frame.id == FLOW_ID
        if known is not None:
            settle(known.answer, frame, known.kind)

    def _welcomed(self, frame: pb.Frame, greeting: type[Message]) -> None:
        self._opened, self._greeting_answered = None, True
        verdict: Answer = Answer()
        settle(verdict, frame, greeting)
        try:
            self.welcome = welcome_of(verdict.result())
            if self._accept is not None:
                self._accept(self.welcome)
        except IsthmusError as error:
            self._refused(error)
        else:
            if not self._greeted.done():
                self._greeted.set_result(verdict.result())

    def _fatal(self, broken: grpc.RpcError) -> IsthmusError | None:
        """The error that ends the channel; None if reconnecting may help."""
        status, details = broken.code(), broken.details() or ""
        if status in _FATAL:
            kind, remedy = _FATAL[status]
            message, _, told = details.partition("\n  remedy: ")
            return kind(f"{self._server} at {self.address} refused the connection: {message}", remedy=told or remedy)
        if status is grpc.StatusCode.UNAVAILABLE and any(word in details for word in _DISTRUST):
            expired = "a certificate has expired: " if "expired" in details.lower() else ""
            return IdentityError(
                f"no trusted connection to {self._server} at {self.address}: {expired}{details[:400]}",
                remedy="both sides need valid certificates of the same authority, made by 'isthmus join' or "
                "'isthmus certificates', and clocks that are right",
            )
        return None

    def _end(self, error: IsthmusError) -> None:
        with self._lock:
            if self._ended is not None:
                return
            self._ended = error
            pending, self._pending = self._pending, {}
            self._outbox.put(None)
            self._over.set()
        if not self._greeted.done():
            self._greeted.set_exception(error)
        for one in pending.values():
            one.answer.set_exception(error)


def own_replica(name: str, count: int) -> int:
    """The number, from 0, of the replica of so many with which a party begins: parties spread over all of them, and
    each comes back to its own."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % count


def proxy_note(address: str) -> str:
    """How the environment's proxy settings bear on a connection to this address, as gRPC reads them; empty: not.

    gRPC takes the first of ``PROXIES`` that is set, in lower case alone, unless ``no_proxy`` names the host. Loopback
    addresses are reached directly.
    """
    if is_loopback(address):
        return ""
    name = next((name for name in PROXIES if os.environ.get(name)), None)
    if name is None:
        upper = next((name.upper() for name in PROXIES if os.environ.get(name.upper())), None)
        return f" without a proxy ({upper} is set, but gRPC reads {upper.lower()})" if upper else ""
    if proxy_for(address) is None:
        return ""
    proxy = os.environ[name].rpartition("@")[2].rpartition("//")[2]  # without a user's name and password
    return f" through the proxy {proxy} (from {name})"


def proxy_for(address: str) -> str | None:
    """The proxy that gRPC takes to this address, as the environment has it: a URL, perhaps with a user's name and
    password; None: it takes none."""
    host = address.rpartition(":")[0].strip("[]")
    exempt = next((os.environ[one] for one in EXEMPT if os.environ.get(one)), "")
    if is_loopback(address) or any(one.strip() and host.endswith(one.strip()) for one in exempt.split(",")):
        return None
    return next((os.environ[name] for name in PROXIES if os.environ.get(name)), None)
