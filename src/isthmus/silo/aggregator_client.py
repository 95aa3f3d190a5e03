"""A silo's way to whoever takes its updates: the root, or its edge; once that is gone, the edge's sibling."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from isthmus.errors import IsthmusError, PeerGoneError, QuorumError, RoundLostError
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.join import connect
from isthmus.silo.noised import NoisedUpdates
from isthmus.silo.update import MaskedUpdates, OpenUpdates, Updates
from isthmus.updates.compression import Compression
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Channel
from isthmus.wire.identity import Identity

log = logging.getLogger(__name__)


class AggregatorClient:
    """Asks for plans and sends updates, round by round.

    Args:
        channel: a way there other than the recipe's address.
    """

    def __init__(self, recipe: Recipe, name: str, boundary: Boundary, channel: Channel | None = None) -> None:
        self._recipe, self._name, self._boundary = recipe, name, boundary
        self._aggregator = recipe.tree.parent(name)
        self._channel = channel or self._connect()
        self._updates = updates(recipe, name, boundary, self._channel)

    def ask(self, completed: int) -> pb.Plan:
        """The next plan; the sibling's if the edge is gone or has too few silos left."""
        try:
            plan: pb.Plan = self._channel.call(pb.Ready(completed=completed, keys=self._updates.offer()))
            return plan
        except (PeerGoneError, QuorumError) as error:
            self._move(error)
            return self.ask(completed)

    def begin(self, plan: pb.Plan) -> None:
        """The round of this plan begins."""
        with self._round():
            self._updates.begin(plan)

    def affordable(self) -> bool:
        """Whether the privacy budget bears an update."""
        return self._updates.affordable()

    def pack(
        self, plan: pb.Plan, change: Mapping[str, torch.Tensor], weight: float, share: float, quality: float
    ) -> pb.Update:
        """What was learned, through the boundary (see ``Updates``)."""
        with self._round():
            return self._updates.pack(plan, change, weight, share, quality)

    def send(self, update: pb.Update) -> None:
        """What was packed."""
        with self._round():
            self._updates.send(update)

    @property
    def crossed(self) -> Mapping[str, torch.Tensor] | None:
        """What was packed last, as it crosses (see ``Updates``)."""
        return self._updates.crossed

    def state_dict(self) -> dict[str, Any]:
        return self._updates.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates.load_state_dict(state)

    def close(self) -> None:
        self._channel.close()

    def _connect(self) -> Channel:
        address = self._recipe.tree.node(self._aggregator).address
        return connect(self._recipe, self._name, "Root", address, server=self._aggregator)

    def _move(self, error: IsthmusError) -> None:
        """Belong to the cohort of the edge's sibling from now on.

        Raises:
            PeerGoneError, QuorumError: this very error, as there is no sibling, or it has failed, too.
        """
        if (sibling := self._sibling()) is None:
            raise error
        log.warning("%s: %s; going on with %s", self._aggregator, error.message, sibling)
        self._channel.close()
        self._aggregator, waiting = sibling, self._updates.state_dict()
        self._channel = self._connect()
        self._updates = updates(self._recipe, self._name, self._boundary, self._channel)
        self._updates.load_state_dict(waiting)

    def _sibling(self) -> str | None:
        """The edge to turn to if this silo's own is gone; it is turned to once."""
        own = self._recipe.tree.parent(self._name)
        return self._recipe.tree.sibling(own) if self._aggregator == own else None

    @contextmanager
    def _round(self) -> Iterator[None]:
        """An edge that is gone loses the round, if there is another to turn to.

        Raises:
            RoundLostError: so it is.
        """
        try:
            yield
        except PeerGoneError as gone:
            if self._sibling() is None:
                raise
            raise RoundLostError(gone.message, remedy="ask its sibling for the next plan") from gone


def updates(recipe: Recipe, name: str, boundary: Boundary, root: Channel) -> Updates:
    """As this recipe wants them sent.

    Raises:
        IdentityError: they are to be masked, and the silo's certificate is unusable.
    """
    compression = Compression.of(recipe)
    if not recipe.federation.secure.masks:
        return OpenUpdates(boundary, root, compression)
    identity = Identity.load(Path(recipe.wire.certificates), name)
    if compression.noise is not None:
        return NoisedUpdates(boundary, root, identity, compression, recipe)
    return MaskedUpdates(boundary, root, identity, compression)
