"""Channels: the interface by which a silo sends requests to a service. Loopback is here, gRPC in ``client``."""

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
"""The future body of an answer, or the error that the peer reported."""

log = logging.getLogger(__name__)


class Service(Protocol):
    """The side that answers requests."""

    def handle(self, peer: str, request: Message) -> Answer:
        """Start to answer a request; must not block. An ``IsthmusError`` raised or set on the future reaches the peer.

        Args:
            peer: the silo's certified name.
        """
        ...


class Channel(Protocol):
    """The side that sends requests. They reach the service in the order of ``submit``; answers come in any order."""

    sent_bytes: int
    """Bytes of all frames sent."""
    received_bytes: int
    """Bytes of all frames received."""

    @property
    def welcome(self) -> pb.Welcome:
        """The service's last answer to ``Hello``; an empty one if the greeting was another request."""
        ...

    def submit(self, request: Message) -> Answer:
        """Send a request. The future gives the answer, or raises the ``IsthmusError`` of the peer or the connection."""
        ...

    def call(self, request: Message) -> Any:
        """Send a request and wait for its answer."""
        ...

    def close(self) -> None:
        """End the channel; open requests fail."""
        ...


class LoopbackChannel:
    """A channel to a service in this process, with the frames, checks and byte counts of the network."""

    def __init__(
        self, service: Service, peer: str, *, greeting: Message | None = None, limit: int = 64 * 2**20
    ) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self._service = service
        self._peer = peer
        self._limit = limit
        self._ids = itertools.count(1)
        self.welcome = pb.Welcome()
        if greeting is not None:
            self.welcome = welcome_of(self.call(greeting))

    def submit(self, request: Message) -> Answer:
        data = frames.wrap(request, id=next(self._ids)).SerializeToString()
        check_size(len(data), self._limit)
        self.sent_bytes += len(data)
        answer: Answer = Future()
        served = answer_request(self._service, self._peer, frames.parse(data))
        served.add_done_callback(lambda done: self._receive(answer, done.result(), type(request)))
        return answer

    def call(self, request: Message) -> Any:
        return self.submit(request).result()

    def close(self) -> None: ...

    def _receive(self, answer: Answer, data: bytes, request: type[Message]) -> None:
        self.received_bytes += len(data)
        settle(answer, frames.parse(data), request)


def answered(body: Message) -> Answer:
    """A finished answer with this body."""
    answer: Answer = Answer()
    answer.set_result(body)
    return answer


def welcome_of(answer: Message) -> pb.Welcome:
    """The answer to a greeting, if it is a welcome; an empty welcome otherwise."""
    return answer if isinstance(answer, pb.Welcome) else pb.Welcome()


def check_size(size: int, limit: int) -> None:
    """Raise ``FrameSizeError`` if a frame of this many bytes exceeds the limit."""
    if size > limit:
        raise FrameSizeError(
            f"a frame has {size:,} bytes; the limit is {limit:,}",
            remedy="use fewer rows or tokens at a time, or raise wire.max_frame_bytes on both sides",
        )


def settle(answer: Answer, frame: pb.Frame, request: type[Message]) -> None:
    """Settle the answer to a request of this kind with a received frame: its body, the error it reports,
    ``FrameError`` if it is malformed, or ``ProtocolError`` if such a request is not answered so."""
    try:
        body = frames.checked(frame)
        if isinstance(body, pb.Failure):
            raise frames.reported_error(body)
        frames.check_answer(request, body)
    except IsthmusError as error:
        answer.set_exception(error)
    else:
        answer.set_result(body)


def forget_frames(error: BaseException | None) -> None:
    """Forget where an error and its causes were raised.

    Those frames hold a request and, through the future of its answer, the error. Such a cycle stays until the garbage
    collector comes, which in a process with many objects is after very many requests.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def answer_request(service: Service, peer: str, frame: pb.Frame) -> Future[bytes]:
    """The encoded answer of a service to one request, which is checked first. Errors become failure frames."""
    encoded: Future[bytes] = Future()
    id = frame.id  # what waits for the answer holds no request

    def finish(answer: Answer) -> None:
        error = answer.exception()
        body = answer.result() if error is None else _failure(peer, error)
        forget_frames(error)
        encoded.set_result(frames.wrap(body, id=id).SerializeToString())

    try:
        answer = service.handle(peer, frames.checked(frame))
    except Exception as error:
        answer = Future()
        answer.set_exception(error)
    answer.add_done_callback(finish)
    return encoded


def _failure(peer: str, error: BaseException) -> pb.Failure:
    if isinstance(error, IsthmusError):
        return frames.failure(error)
    log.error("answering %s failed", peer, exc_info=error)
    unknown = IsthmusError(f"the peer failed with {type(error).__name__}", remedy="see the peer's log")
    return frames.failure(unknown)
