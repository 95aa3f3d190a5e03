"""A client of the trunk's rounds: those of a federation, and open ones for a training loop of one's own."""

from __future__ import annotations

from typing import NamedTuple

from isthmus.errors import ProtocolError, RoundLostError
from isthmus.model.optimizer_settings import OptimizerSettings
from isthmus.recipe import RoundSteps
from isthmus.silo.served import ServedRound
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Channel


class SavedRound(NamedTuple):
    """A state that the trunk has saved."""

    number: int
    digest: bytes
    """SHA-256 of the saved state."""


class RoundsClient:
    """Client of the trunk's rounds and optimizer steps.

    A training step is one or more forwards and backwards through the split model, whose gradients accumulate, and then
    a step of the trunk. Whoever calls ``begin`` steps the trunk with ``commit``. Otherwise the optimizer that holds the
    model's parameters does (``silo.stand_in``), in an open round that begins with its first step.

    Args:
        participants: the silos that train together in open rounds, each step of which waits for all of them; none: this
            silo alone.
        gradients: whether loss gradients leave the silo; without them its steps weigh nothing on the trunk.
    """

    def __init__(self, channel: Channel, participants: list[str] | None = None, *, gradients: bool = True) -> None:
        self._channel, self._gradients = channel, gradients
        self.participants = participants or []
        self.served = ServedRound()
        """The round of the silo's adapters; it is no longer checked once the silo trains."""
        self.by_hand = False
        """Whether ``begin`` was called: the caller commits."""
        self._open: int | None = None
        """Number of the open round that this silo is in."""
        self._step = 0
        self._saved: SavedRound | None = None
        """The saved round at which the open round started, or which it ended with."""

    def begin(
        self,
        round: int,
        participants: list[str],
        steps: RoundSteps | None = None,
        published: pb.Published | None = None,
    ) -> None:
        """Start a round, from 1, and wait until all participants have started it.

        Args:
            steps: this silo's own; None: the recipe says how many.
            published: the root's word, from its plan, that the version before is there; of a root with a buffer.
        """
        self.served.release()
        self.by_hand, self._open = True, None
        own = None if steps is None else pb.Steps(count=steps.count, before=steps.before, total=steps.total)
        request = pb.Begin(round=round, participants=participants, steps=own, published=published)
        self._channel.call(request)

    def commit(self, round: int, step: int, weight: float) -> int:
        """End an optimizer step: wait until the trunk has updated its adapter with the gradients of this step.

        Args:
            round, step: both from 1.
            weight: number of tokens of the step's answers with their filler; the trunk refuses more than it counted in
                the silo's backwards, or than ``train.batch`` rows can have.

        Returns:
            The number of silos whose gradients the trunk's step used.
        """
        own = weight if self._gradients else 0
        stepped: pb.Stepped = self._channel.call(pb.Commit(round=round, step=step, weight=own))
        return stepped.contributors

    def step(self, weight: float, settings: OptimizerSettings, scale: float | None) -> None:
        """Take an optimizer step in an open round, which begins where the trunk is unless one is running.

        Args:
            weight: number of tokens in the step's gradients; 0: none.
            settings: of the optimizer that steps the silo's own parameters.
            scale: factor of the trunk's gradients; None: 1.

        Raises:
            ProtocolError: another silo trains with the trunk, or one that takes part differs in its settings.
            RoundLostError: the trunk, or the round, started again without this silo.
        """
        if self._open is None:
            self._begin_open(pb.Begin(open=True, participants=self.participants))
        self._step += 1
        request = pb.Commit(
            round=self._open or 0, step=self._step, weight=weight, optimizer=settings.message(), scale=scale
        )
        try:
            self._channel.call(request)
        except RoundLostError as error:
            raise RoundLostError(
                f"the trunk has given up this silo's steps since its round {self._saved.number if self._saved else 0}",
                remedy="load the last model that was saved, and train on from there",
            ) from error

    def save(self) -> SavedRound | None:
        """End the open round, if there is one with a step, so that the trunk saves its state.

        Returns:
            The saved round at which the trunk is; None if rounds are begun by hand, and saved after their last step.

        Raises:
            ProtocolError: another silo trains.
        """
        if self.by_hand:
            return None
        if self._open is None and self._saved is None:
            self._begin_open(pb.Begin(open=True, participants=self.participants))
        if self._open is not None and self._step:
            ended: pb.Ended = self._channel.call(pb.End(round=self._open))
            self._saved, self._open = SavedRound(self._open, ended.digest), None
        assert self._saved is not None
        return self._saved

    def restore(self, saved: SavedRound) -> None:
        """Bring the trunk back to a saved round, in an open round that starts from there.

        Raises:
            ProtocolError: the trunk no longer has that round, or a round of the federation is running.
            MismatchError: its round of this number has another state.
        """
        self.by_hand = False
        number, digest = saved
        self._begin_open(pb.Begin(open=True, participants=self.participants, start=number, digest=digest))

    def _begin_open(self, request: pb.Begin) -> None:
        self.served.release()
        self._open, self._step = None, 0
        begun: pb.Begun = self._channel.call(request)
        if not begun.round:
            raise ProtocolError(
                "a round of the federation began instead", remedy="train with a loop of your own once it has finished"
            )
        self._open, self._saved = begun.round, SavedRound(begun.start, begun.digest)
