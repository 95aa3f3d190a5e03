"""The gRPC server: receives streams of frames, passes requests to services, and answers each request id exactly
once."""

from __future__ import annotations

import datetime
import errno
import logging
import socket
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import grpc

from isthmus.errors import FrameError, IdentityError, IsthmusError, PeerGoneError, ProtocolError
from isthmus.recipe.tree import ROOT
from isthmus.wire.channel import Service, forget_frames
from isthmus.wire.chunks import Assembler, in_chunks
from isthmus.wire.identity import Identity, Role
from isthmus.wire.inbox import MAX_INSTANCES, VISITORS, Inbox, PeerAccount, Stream
from isthmus.wire.traffic import PeerTraffic

log = logging.getLogger(__name__)
METHOD_PATH = "/isthmus.Wire/{}"
INSTANCE_KEY = "isthmus-instance"
"""Metadata key of the client object's random name, which distinguishes a new client from a reconnected one."""
MAX_INSTANCE = 64
"""Longest such name, in characters."""
HANDSHAKE_SECONDS = 20.0
"""Time for whoever connects to show a certificate."""
IDLE_SECONDS = 60.0
"""Time for which a connection may be without a stream."""
CERTIFICATE_SECONDS = 1.0
"""Time between two looks whether the certificates behind open streams are still valid."""
MODEL = "Model"
AUTHORITY = "Authority"
"""The service that guests may connect to, and parties of every role."""
GUEST_STREAMS = 16
"""Streams that guests and parties together may have open to it."""
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 60_000),  # a ping waits behind what the network holds of a large frame
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


class Doorkeeper(Service, Protocol):
    """The service ``Authority``: it answers guests, who have an invite and no certificate of the federation yet."""

    def anchors(self) -> bytes:
        """PEM certificates by which TLS trusts the guests."""
        ...

    def admit(self, certificate: bytes) -> str:
        """The peer that a guest's PEM certificate is, which no party's name can be; empty if it is no guest's.

        Raises:
            IdentityError: it is that of an invite which is used, expired or withdrawn.
        """
        ...

    def added(self) -> frozenset[str]:
        """Silos that were added since the federation began."""
        ...

    def role_of(self, name: str) -> Role:
        """The role of a party of the federation.

        Raises:
            IdentityError: there is none of this name.
        """
        ...


@dataclass(frozen=True)
class Visitor:
    """Who is behind a stream."""

    service: str
    peer: str
    certificate: bytes
    """PEM."""
    role: Role | None
    """None: a guest."""


class Server:
    """Serves named services (``Trunk``, ``Root``) to peers with certificates of the federation's authority.

    The certificates behind open streams are looked at again every second: a stream ends when its party's certificate
    expires or is revoked. When the server's own certificate is renewed, new connections get the new one.

    Args:
        services: the services by name.
        identity: the server's identity.
        peers: for each service, the names of the parties that may connect.
        edges: those of them that are edges; the others are silos, or the root.
        doorkeeper: the service ``Authority``, if guests are to be answered here.
        address: ``host:port`` to listen at; port 0 chooses a free port.
        limit: largest frame in bytes.
        grace: seconds after which the answers to a client that does not reconnect are freed. It should exceed the time
            for which clients try.

    Raises:
        IsthmusError: the host is unknown, or the port is in use.
    """

    def __init__(
        self,
        services: Mapping[str, Service],
        identity: Identity,
        peers: Mapping[str, Collection[str]],
        address: str,
        limit: int,
        grace: float = 120.0,
        *,
        edges: Collection[str] = (),
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        if doorkeeper is not None:
            services = {**services, AUTHORITY: doorkeeper}
        self._services, self._doorkeeper = services, doorkeeper
        self._identity = identity
        self._shown: tuple[Identity, bytes] | None = None
        """What new connections see: the server's identity, and the guests that are expected."""
        self._limit, self._grace = limit, grace
        self._edges = frozenset(edges)
        self._peers = {service: frozenset(names) for service, names in peers.items()}
        self._accounts = {
            (name, peer): PeerAccount(service, peer, limit, grace)
            for name, service in services.items()
            for peer in self._peers.get(name, ())
        }
        self._visitors: dict[Stream, tuple[Inbox, Visitor]] = {}
        self._lock = threading.Lock()
        """Guards accounts and visitors."""
        self._over = threading.Event()
        streams = (MAX_INSTANCES + VISITORS) * len(self._accounts) + GUEST_STREAMS  # and a few that end or are refused
        threads = ThreadPoolExecutor(streams + 8, thread_name_prefix="stream")
        options = (
            ("grpc.max_receive_message_length", limit + 1024),
            ("grpc.max_send_message_length", limit + 1024),
            ("grpc.max_metadata_size", 8192),
            ("grpc.max_concurrent_streams", 8),
            ("grpc.server_handshake_timeout_ms", int(1000 * HANDSHAKE_SECONDS)),
            ("grpc.max_connection_idle_ms", int(1000 * IDLE_SECONDS)),
            ("grpc.so_reuseport", 0),
            *KEEPALIVE,
        )
        self._server = grpc.server(threads, options=options)
        methods = {
            name: grpc.stream_stream_rpc_method_handler(self._stream_of(name))  # raw bytes both ways
            for name in services
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("isthmus.Wire", methods),))
        try:
            self.port = self._server.add_secure_port(_checked_address(address), self._credentials())
        except (OSError, RuntimeError) as error:
            raise IsthmusError(
                f"cannot listen at {address}", remedy="free the port, or set another address in the recipe"
            ) from error

    def start(self) -> None:
        """Start to accept streams."""
        self._server.start()
        threading.Thread(target=self._keep_watching, name="certificates", daemon=True).start()

    def stop(self, grace: float = 1.0) -> None:
        """Stop listening. Open streams end after ``grace`` seconds."""
        self._over.set()
        self._server.stop(grace).wait()

    def held(self, service: str, peer: str) -> int:
        """Bytes of requests and answers that are held for a peer of a service."""
        return self._accounts[service, peer].held

    @property
    def expires(self) -> datetime.datetime:
        """When the server's own certificate does."""
        return self._identity.ends

    def traffic(self) -> list[PeerTraffic]:
        """What each peer has sent and got since the server started, by service and peer."""
        with self._lock:
            accounts = sorted(self._accounts.items())
        return [account.seen(service) for (service, _), account in accounts]

    def _stream_of(self, name: str):  # type: ignore[no-untyped-def]
        def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._stream(name, requests, context)

        return stream

    def _stream(self, name: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        stream = Stream(context.cancel)
        try:
            visitor = self._visitor(name, context)
            inbox, ended = self._account(visitor).connect(_instance(context), stream)
        except IsthmusError as error:
            fields = {"service": name, "code": error.code}
            log.warning("a connection to the %s was refused: %s", name.lower(), error.message, extra=fields)
            context.abort(_status(error), str(error))
        fields = {"service": name, "peer": visitor.peer}
        log.info("%s is connected to the %s", visitor.peer, name.lower(), extra=fields)
        for one in ended:
            one.cancel()
        with self._lock:
            self._visitors[stream] = inbox, visitor
        context.add_callback(lambda: self._leave(inbox, stream))
        name = f"requests of {inbox.peer}"
        threading.Thread(target=self._read, args=(requests, inbox, stream, ended), name=name, daemon=True).start()
        try:
            while (data := inbox.next(stream)) is not None:
                yield from in_chunks(data)
        finally:
            self._leave(inbox, stream)
        if stream.error is not None:
            context.abort(_status(stream.error), str(stream.error))

    def _leave(self, inbox: Inbox, stream: Stream) -> None:
        inbox.leave(stream)
        with self._lock:
            inside = self._visitors.pop(stream, None)
        if inside is not None:  # the first of the two calls for a stream
            service, peer = inside[1].service, inside[1].peer
            reason = "ended by the peer or the network" if stream.error is None else stream.error.message
            fields = {"service": service, "peer": peer, "code": stream.error.code if stream.error else ""}
            log.info("%s has left the %s: %s", peer, service.lower(), reason, extra=fields)

    def _read(self, requests: Iterator[bytes], inbox: Inbox, stream: Stream, before: Sequence[Stream]) -> None:
        for one in before:
            one.read.wait()  # requests reach the service in their order, over streams
        error: IsthmusError | None = None
        received = Assembler(self._limit + 1024)
        try:
            for data in requests:
                if (whole := received.add(data)) is None:
                    inbox.tell_flow(stream)
                else:
                    inbox.receive(whole, stream)
        except Exception as ended:  # a bare one from gRPC's iterator, if the stream is gone
            error = ended if isinstance(ended, FrameError) else None
            forget_frames(ended)
        finally:
            stream.read.set()
            inbox.end(stream, error)

    def _visitor(self, service: str, context: grpc.ServicerContext) -> Visitor:
        """Who connects to a service.

        Raises:
            IdentityError: someone who may not, or whose certificate is not valid.
        """
        seen: Mapping[str, Sequence[bytes]] = context.auth_context()  # type: ignore[assignment]
        names = seen.get("x509_common_name", ())
        certificate = b"".join((*seen["x509_pem_cert"], *seen.get("x509_pem_cert_chain", ())))
        name = names[0].decode() if names else ""
        if service == AUTHORITY:
            assert self._doorkeeper is not None
            if guest := self._doorkeeper.admit(certificate):
                return Visitor(service, guest, certificate, None)
        visitor = Visitor(service, name, certificate, self._role(service, name))
        self._identity = self._identity.renewed()
        self._check(visitor)
        return visitor

    def _role(self, service: str, name: str) -> Role:
        """The role that a party must have to connect to a service.

        Raises:
            IdentityError: it may not.
            PeerGoneError: it may soon: it has been added to the federation, and is not taken up here yet.
        """
        if name in self._peers.get(service, ()):
            return "edge" if name in self._edges else "root" if name == ROOT else "silo"
        refusal = IdentityError(
            f"{name[:64]!r} may not connect to this {service.lower()}", remedy="list it in the recipe"
        )
        if self._doorkeeper is None:
            raise refusal
        if service == AUTHORITY:
            return self._doorkeeper.role_of(name)
        if name not in self._doorkeeper.added():
            raise refusal
        if service == MODEL:
            return "silo"
        raise PeerGoneError(
            f"{name} was added to the federation, and takes part after the round that is under way",
            remedy="wait; start it again if it has given up",
        )

    def _account(self, visitor: Visitor) -> PeerAccount:
        """What the visitor holds of its service. Raises ``ProtocolError`` if too many are at ``Authority``."""
        service, peer = visitor.service, visitor.peer
        with self._lock:
            here = sum(one.service == AUTHORITY for _, one in self._visitors.values())
            if service == AUTHORITY and here >= GUEST_STREAMS:
                raise ProtocolError("too many parties are joining now", remedy="try again in a minute")
            if (service, peer) not in self._accounts:
                self._accounts[service, peer] = PeerAccount(self._services[service], peer, self._limit, self._grace)
            return self._accounts[service, peer]

    def _check(self, visitor: Visitor) -> None:
        """Raise ``IdentityError`` if the visitor's certificate is not valid now."""
        if visitor.role is not None:
            self._identity.check_peer(visitor.certificate, visitor.peer, visitor.role)

    def _keep_watching(self) -> None:
        """End the streams of those whose certificates are no longer valid."""
        while not self._over.wait(CERTIFICATE_SECONDS):
            self._identity = self._identity.renewed()
            with self._lock:
                visitors = list(self._visitors.items())
            for stream, (inbox, visitor) in visitors:
                try:
                    self._check(visitor)
                except IdentityError as error:
                    inbox.end(stream, error)

    def _credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the server's identity, and the guests that are expected."""
        first = self._configuration()
        assert first is not None
        return grpc.dynamic_ssl_server_credentials(
            first,
            self._configuration,  # type: ignore[arg-type]  # None is allowed, and means no change
            require_client_authentication=True,
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration | None:
        """What a new connection is to see; None: what the last one saw."""
        self._identity = self._identity.renewed()
        guests = b"" if self._doorkeeper is None else self._doorkeeper.anchors()
        if self._shown == (self._identity, guests):
            return None
        self._shown = self._identity, guests
        return self._identity.server_configuration(guests)


def _instance(context: grpc.ServicerContext) -> str:
    """The client's name for itself.

    Raises:
        FrameError: it is too long.
    """
    instance = str(dict(context.invocation_metadata()).get(INSTANCE_KEY, ""))
    if len(instance) > MAX_INSTANCE:
        raise FrameError(
            f"a client's name of {len(instance)} characters", remedy="both sides must run the same version of isthmus"
        )
    return instance


def _status(error: IsthmusError) -> grpc.StatusCode:
    """The status of a stream that is not accepted."""
    return grpc.StatusCode.PERMISSION_DENIED if isinstance(error, IdentityError) else error.status


def _checked_address(address: str) -> str:
    """The address to bind, after a check that the port is free at all addresses of the host. gRPC accepts without an
    error that it is free at only one of them.

    Raises:
        OSError: the host is unknown, or the port is in use at one of its addresses.
    """
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    if port == "0":
        first = str(found[0][4][0])
        return f"[{first}]:0" if ":" in first else f"{first}:0"
    for family, *_, where in found:
        try:
            socket.create_server(where[:2], family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return address
