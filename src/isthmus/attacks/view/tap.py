"""The tap: a channel that keeps every frame that passes, so that a view can be filled from what really crossed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from isthmus.wire.channel import Answer, Channel


@dataclass(frozen=True)
class Exchange:
    """One request as it left, and what answers it."""

    kind: type[Message]
    data: bytes
    """The request's own bytes: a sender that changes its message afterwards changes nothing here."""
    answer: Answer

    @property
    def request(self) -> Any:
        return self.kind.FromString(self.data)

    @property
    def answered(self) -> Any:
        """The answer's body; None for an answer that was an error."""
        return None if self.answer.exception() is not None else self.answer.result()


class Tap:
    """Implements ``wire.channel.Channel`` around another channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.exchanges: list[Exchange] = []

    @property
    def sent_bytes(self) -> int:
        return self._channel.sent_bytes

    @sent_bytes.setter
    def sent_bytes(self, value: int) -> None:
        self._channel.sent_bytes = value

    @property
    def received_bytes(self) -> int:
        return self._channel.received_bytes

    @received_bytes.setter
    def received_bytes(self, value: int) -> None:
        self._channel.received_bytes = value

    def submit(self, request: Message) -> Answer:
        data = request.SerializeToString()
        answer = self._channel.submit(request)
        self.exchanges.append(Exchange(type(request), data, answer))
        return answer

    def call(self, request: Message) -> Any:
        return self.submit(request).result()

    def close(self) -> None:
        self._channel.close()
