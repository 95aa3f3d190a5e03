"""The channel: how a silo asks a service. One interface, two implementations (loopback here, gRPC in ``client``)."""

from __future__ import annotations

import itertools
import logging
from concurrent.futures import Future
from typing import Any, Protocol

from google.protobuf.message import Message

from isthmus.errors import FrameSizeError, IsthmusError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb

Answer = Future[Message]
"""The body that answers a request, once it is there; or the error that the peer answered with."""

log = logging.getLogger(__name__)


class Service(Protocol):
    """The answering side. ``peer`` is the silo's certified name."""

    def handle(self, peer: str, request: Message) -> Answer:
        """Begin to answer; never block. An ``IsthmusError`` raised or set on the future reaches the peer."""
        ...


class Channel(Protocol):
    """The asking side. Requests reach the service in the order of ``submit``; answers come when they are ready."""

    sent_bytes: int
    received_bytes: int

    def submit(self, request: Message) -> Answer:
        """Send; the future gives the answer, or raises the ``IsthmusError`` that the peer or the way gave."""
        ...

    def call(self, request: Message) -> Any:
        """Send and wait for the answer."""
        ...

    def close(self) -> None: ...


class LoopbackChannel:
    """A channel to a service in this process. Frames take the same bytes and checks as over the network."""

    def __init__(
        self, service: Service, peer: str, *, greeting: Message | None = None, limit: int = 64 * 2**20
    ) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self._service = service
        self._peer = peer
        self._limit = limit
        self._ids = itertools.count(1)
        if greeting is not None:
            self.call(greeting)

    def submit(self, request: Message) -> Answer:
        data = frames.wrap(request, id=next(self._ids)).SerializeToString()
        check_size(len(data), self._limit)
        self.sent_bytes += len(data)
        answer: Answer = Future()
        served = serve(self._service, self._peer, frames.decode(data))
        served.add_done_callback(lambda done: self._receive(answer, done.result()))
        return answer

    def call(self, request: Message) -> Any:
        return self.submit(request).result()

    def close(self) -> None: ...

    def _receive(self, answer: Answer, data: bytes) -> None:
        self.received_bytes += len(data)
        settle(answer, frames.decode(data))


def answered(body: Message) -> Answer:
    """The answer that is there at once."""
    answer: Answer = Answer()
    answer.set_result(body)
    return answer


def check_size(size: int, limit: int) -> None:
    """Raise ``FrameSizeError`` if a frame of this many bytes is over the limit."""
    if size > limit:
        raise FrameSizeError(
            f"a frame of {size:,} bytes, the limit is {limit:,}",
            remedy="use fewer rows or tokens at a time, or raise wire.max_frame_bytes on both sides",
        )


def settle(answer: Answer, frame: pb.Frame) -> None:
    """Give an answer its body, or its error if the peer reported one or the frame is malformed."""
    try:
        frames.check(frame)
    except IsthmusError as error:
        answer.set_exception(error)
        return
    body = frames.body(frame)
    if isinstance(body, pb.Failure):
        answer.set_exception(frames.raised(body))
    else:
        answer.set_result(body)


def serve(service: Service, peer: str, frame: pb.Frame) -> Future[bytes]:
    """Check one request, let the service answer it, and encode the answer; errors become failure frames."""
    encoded: Future[bytes] = Future()

    def finish(answer: Answer) -> None:
        error = answer.exception()
        body = answer.result() if error is None else _failure(peer, error)
        encoded.set_result(frames.wrap(body, id=frame.id).SerializeToString())

    try:
        frames.check(frame)
        answer = service.handle(peer, frames.body(frame))
    except Exception as error:
        answer = Future()
        answer.set_exception(error)
    answer.add_done_callback(finish)
    return encoded


def _failure(peer: str, error: BaseException) -> pb.Failure:
    if isinstance(error, IsthmusError):
        return frames.failure(error)
    log.error("answering %s failed", peer, exc_info=error)
    unknown = IsthmusError(f"the peer failed: {type(error).__name__}", remedy="see the log of the peer")
    return frames.failure(unknown)
