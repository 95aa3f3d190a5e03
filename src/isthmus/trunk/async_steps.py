"""Optimizer steps of silos that wait for nobody: each steps the trunk's one adapter by itself, at once."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from isthmus.errors import ProtocolError
from isthmus.recipe import Recipe
from isthmus.storage.record import Journal, RoleDirectory
from isthmus.trunk.scheduler import Scheduler
from isthmus.trunk.steps import check_next, lost
from isthmus.trunk.training import Training
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer


@dataclass
class Place:
    """Where one silo is."""

    round: int
    step: int = 0
    """The last one it has committed."""


class AsyncSteps:
    """In place of ``steps.Steps`` where the root has a buffer: the same requests, and no barrier.

    The adapter is one for all and goes on whatever version the silos' ends are of (as in SplitFed's second version,
    Thapa et al. 2022). A backward through an adapter that others have stepped since is computed again, as for a late
    silo. The first silo that begins with a version makes the trunk keep its state as that version's; what later dies,
    silo, root or trunk, takes back no step.

    Args:
        store: where ``training`` keeps its states.
    """

    def __init__(
        self, training: Training, scheduler: Scheduler, recipe: Recipe, store: RoleDirectory, journal: Journal
    ) -> None:
        self._training, self._scheduler, self._recipe = training, scheduler, recipe
        self._store, self._journal = store, journal
        self._lock = threading.Lock()
        self._places: dict[str, Place] = {}
        self._over = False

    def begin(self, peer: str, request: pb.Begin) -> Answer:
        """Answered once the trunk has kept its state. A round after the last begins nothing, and ends all others."""
        if peer not in request.participants:
            raise ProtocolError(f"{peer} is no participant of round {request.round}", remedy="wait for the next plan")
        version = request.round - 1

        def begin() -> pb.Begun:
            self._training.forget(peer)
            if version > self._store.last_round():
                self._training.save(version)
            return pb.Begun()

        with self._lock:
            self._over = self._over or version >= self._recipe.train.rounds
            self._places[peer] = Place(request.round)
            return self._scheduler.submit(begin)

    def commit(self, peer: str, request: pb.Commit) -> Answer:
        """Answered once the trunk has stepped with this silo's gradients.

        Raises:
            RoundLostError: the silo has not begun this round here, or the last version is out.
            OutOfOrderError: not its next step.
        """

        def step() -> pb.Stepped:
            self._training.step({peer: request.weight}, together=False)
            self._journal.append({"round": request.round, "step": request.step, "silos": [peer]})
            return pb.Stepped(contributors=1)

        with self._lock:
            place = self._places.get(peer)
            if self._over or place is None or place.round != request.round:
                raise lost(peer, request.round)
            check_next(request, place.step, self._recipe.steps(peer))
            place.step = request.step
            return self._scheduler.submit(step)
