"""The gRPC server: receives streams of frames, passes requests to services, and answers each request id exactly
once."""

from __future__ import annotations

import errno
import queue
import socket
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
from cryptography import x509

from isthmus.errors import FrameError, IdentityError, IsthmusError, ProtocolError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Service, answer_request
from isthmus.wire.identity import Identity, Role, check_role

METHOD_PATH = "/isthmus.Wire/{}"
INSTANCE_KEY = "isthmus-instance"
"""Metadata key of the client object's random name, which distinguishes a new client from a reconnected one."""
CLIENTS: dict[str, tuple[Role, ...]] = {"Trunk": ("silo",), "Root": ("silo", "edge")}
"""Whose certificates connect to a service."""
MAX_UNACKED = 1024
"""Largest number of answers that a client has not acknowledged."""
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


class Inbox:
    """The requests of one client to one service. A request that is received again gets the same answer again."""

    def __init__(self, service: Service, peer: str, instance: str) -> None:
        self.instance = instance
        self._service = service
        self._peer = peer
        self._answers: dict[int, Future[bytes]] = {}
        self._last = 0
        self._lock = threading.Lock()  # a broken stream may still be read beside its successor

    def receive(self, frame: pb.Frame, outbox: queue.SimpleQueue[bytes | None]) -> None:
        """Answer a frame through the outbox, now or later. The greeting, id 0, is processed anew each time.

        Raises:
            ProtocolError: the client has more than ``MAX_UNACKED`` unacknowledged answers.
        """
        with self._lock:
            for known in [known for known in self._answers if known <= frame.acked]:
                del self._answers[known]
            if len(self._answers) > MAX_UNACKED:
                raise ProtocolError(f"more than {MAX_UNACKED} answers are not acknowledged", remedy="read the answers")
            answer = self._answers.get(frame.id)
            if answer is None:
                if 0 < frame.id <= self._last:
                    return
                answer = answer_request(self._service, self._peer, frame)
                if frame.id:
                    self._last = frame.id
                    self._answers[frame.id] = answer
        answer.add_done_callback(lambda done: outbox.put(done.result()))


class Server:
    """Serves named services (``Trunk``, ``Root``) to peers with certificates of the federation's authority.

    Args:
        services: the services by name.
        identity: the server's identity.
        peers: for each service, the names of the parties that may connect.
        address: ``host:port`` to listen at; port 0 chooses a free port.
        limit: largest frame in bytes.

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
    ) -> None:
        self._services = services
        self._peers = {service: frozenset(names) for service, names in peers.items()}
        self._inboxes: dict[tuple[str, str], Inbox] = {}
        self._lock = threading.Lock()
        threads = ThreadPoolExecutor(2 * sum(map(len, self._peers.values())) + 8, thread_name_prefix="stream")
        options = (
            ("grpc.max_receive_message_length", limit + 1024),
            ("grpc.max_send_message_length", limit + 1024),
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
            self.port = self._server.add_secure_port(_checked_address(address), identity.server_credentials())
        except (OSError, RuntimeError) as error:
            raise IsthmusError(
                f"cannot listen at {address}", remedy="free the port, or set another address in the recipe"
            ) from error

    def start(self) -> None:
        """Start to accept streams."""
        self._server.start()

    def stop(self, grace: float = 1.0) -> None:
        """Stop listening. Open streams end after ``grace`` seconds."""
        self._server.stop(grace).wait()

    def _stream_of(self, name: str):  # type: ignore[no-untyped-def]
        def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._stream(name, requests, context)

        return stream

    def _stream(self, name: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            inbox = self._inbox(name, context)
        except IdentityError as error:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        broken: list[IsthmusError] = []
        reader = threading.Thread(target=self._read, args=(requests, inbox, outbox, broken), daemon=True)
        reader.start()
        while (data := outbox.get()) is not None:
            yield data
        if broken:
            context.abort(broken[0].status, str(broken[0]))

    def _read(
        self,
        requests: Iterator[bytes],
        inbox: Inbox,
        outbox: queue.SimpleQueue[bytes | None],
        broken: list[IsthmusError],
    ) -> None:
        try:
            for data in requests:
                inbox.receive(frames.parse(data), outbox)
        except (FrameError, ProtocolError) as error:
            broken.append(error)
        except Exception:
            pass  # gRPC ends a request iterator with a bare exception when the stream is gone
        finally:
            outbox.put(None)

    def _inbox(self, service: str, context: grpc.ServicerContext) -> Inbox:
        seen: Mapping[str, Sequence[bytes]] = context.auth_context()  # type: ignore[assignment]
        names = seen.get("x509_common_name", ())
        peer = names[0].decode() if names else ""
        if peer not in self._peers[service]:
            raise IdentityError(
                f"{peer[:64]!r} may not connect to this {service.lower()}", remedy="list it in the recipe"
            )
        check_role(x509.load_pem_x509_certificate(seen["x509_pem_cert"][0]), CLIENTS[service])
        instance = str(dict(context.invocation_metadata()).get(INSTANCE_KEY, ""))
        with self._lock:
            inbox = self._inboxes.get((service, peer))
            if inbox is None or inbox.instance != instance:
                inbox = self._inboxes[service, peer] = Inbox(self._services[service], peer, instance)
            return inbox


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
