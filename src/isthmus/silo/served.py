"""The round whose adapter a trunk serves: a silo's ends must have the adapters of the same round of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from isthmus.errors import RunError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.client import GrpcChannel


@dataclass(frozen=True)
class SharedAdapters:
    """The adapters of bottom and top after a round."""

    completed: int
    """The round."""
    run: str
    """Name of the run whose trunk the silos were connected to; empty: not known."""
    tensors: Mapping[str, torch.Tensor]
    """By uncut name."""


class ServedRound:
    """The round of a silo's adapters. Once it is set, a trunk that serves another one is refused.

    A trunk process may be replaced while the silo is connected, and its successor have another round's adapter: the
    silo refuses it. Or another silo trains, and the same trunk goes on: the trunk, which is told the round in the
    greeting, then no longer answers this silo.
    """

    def __init__(self) -> None:
        self._welcome: pb.Welcome | None = None
        self._channel: GrpcChannel | None = None
        self._hello = pb.Hello()

    def connect(self, channel: GrpcChannel, hello: pb.Hello) -> None:
        """Tell the trunk at the other side of this channel, too, which round is set.

        Args:
            hello: the channel's greeting.
        """
        self._channel, self._hello = channel, hello

    def set(self, welcome: pb.Welcome) -> None:
        """The ends have the adapters of the round of this welcome.

        Raises:
            RunError: the trunk has gone on since.
        """
        self._welcome = welcome
        if self._channel is not None:
            hello = pb.Hello(ends=welcome.completed)
            hello.MergeFrom(self._hello)
            self._channel.greet_with(hello)
            self._channel.call(hello)

    def release(self) -> None:
        """The silo trains from now on: the round is no longer checked, and no other trunk will do."""
        self._welcome = None
        if self._channel is not None:
            self._channel.stay()
            self._channel.greet_with(self._hello)

    def check(self, welcome: pb.Welcome) -> None:
        """Check the welcome of a new connection.

        Raises:
            RunError: the trunk serves another round, or another run.
        """
        expected = self._welcome
        if expected is None:
            return
        require_finished(welcome)
        if welcome.completed != expected.completed or not same_run(welcome.run, expected.run):
            raise RunError(
                f"the trunk was replaced: it serves round {welcome.completed}"
                f"{'' if same_run(welcome.run, expected.run) else ' of another run'}, "
                f"the silo has round {expected.completed}",
                remedy="open the run again",
            )


def require_finished(welcome: pb.Welcome) -> None:
    """Check that the trunk's adapter is that of a finished round.

    Raises:
        RunError: the trunk is within a round.
    """
    if welcome.training:
        raise RunError(
            f"the trunk trains: its adapter is no longer that of round {welcome.completed}",
            remedy="wait until the round has finished; if nobody trains any more, start the trunk again",
        )


def same_run(one: str, other: str) -> bool:
    """Whether two names may be of the same run; an empty name may be of any."""
    return not one or not other or one == other
