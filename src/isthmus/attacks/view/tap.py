"""A channel that records every frame, so that a view holds the real frames of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel


@dataclass(frozen=True)
class Exchange:
    """One request and its answer."""

    kind: type[Message]
    data: bytes
    """The request, serialized when it was sent: later changes to the message do not matter."""
    answer: Answer
    """The pending answer."""

    @property
    def request(self) -> Any:
        """The request as a message of type ``kind``."""
        return self.kind.FromString(self.data)

    @property
    def response(self) -> Any:
        """The answer's message; None if the answer was an error. Waits until the answer is there."""
        return None if self.answer.exception() is not None else self.answer.result()


class Tap:
    """A ``wire.channel.Channel`` that forwards to another channel and records each exchange in ``exchanges``."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.exchanges: list[Exchange] = []

    @property
    def sent_bytes(self) -> int:
        """Bytes sent over the other channel."""
        return self._channel.sent_bytes

    @sent_bytes.setter
    def sent_bytes(self, value: int) -> None:
        self._channel.sent_bytes = value

    @property
    def received_bytes(self) -> int:
        """Bytes received over the other channel."""
        return self._channel.received_bytes

    @received_bytes.setter
    def received_bytes(self, value: int) -> None:
        self._channel.received_bytes = value

    @property
    def welcome(self) -> pb.Welcome:
        """As of the other channel."""
        return self._channel.welcome

    def submit(self, request: Message) -> Answer:
        """Send a request and record it with its pending answer."""
        data = request.SerializeToString()
        answer = self._channel.submit(request)
        self.exchanges.append(Exchange(type(request), data, answer))
        return answer

    def call(self, request: Message) -> Any:
        """Send a request, record it, and wait for its answer."""
        return self.submit(request).result()

    def close(self) -> None:
        """Close the other channel."""
        self._channel.close()
