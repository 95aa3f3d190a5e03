"""Asynchronous optimizer steps: each silo steps the trunk's one adapter by itself, without waiting for others."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from isthmus.errors import NotSupportedError, ProtocolError
from isthmus.recipe import Recipe
from isthmus.storage.journal import Journal
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.scheduler import Scheduler
from isthmus.trunk.sync_steps import check_next, check_weight, round_lost
from isthmus.trunk.training import TrunkTraining
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer
from isthmus.wire.identity import Identity
from isthmus.wire.published import verify_version

log = logging.getLogger(__name__)


@dataclass
class CommitProgress:
    """The round that one silo is in, and its last committed step there."""

    round: int
    step: int = 0


class AsyncSteps:
    """In progress of ``steps.Steps`` where the root has a buffer: the same requests, and no barrier.

    The adapter is one for all and goes on whatever version the silos' ends are of (as in SplitFed's second version,
    Thapa et al. 2022). A backward through an adapter that others have stepped since is computed again, as for a late
    silo. The first silo that begins with a version makes the trunk keep its state as that version's; what later dies,
    silo, root or trunk, takes back no step.

    A silo begins with a version alone that it shows the root's signature for: else one silo could end the steps of
    all, or have the state of now saved as that of a version to come.

    Args:
        store: where ``training`` keeps its states.
        identity: the trunk's, to verify the root's signature; None: all parties are in this process, without
            certificates, and what a silo says is believed.
        run: name of the trunk's run.
    """

    def __init__(
        self,
        training: TrunkTraining,
        scheduler: Scheduler,
        recipe: Recipe,
        store: RoleDirectory,
        journal: Journal,
        *,
        identity: Identity | None = None,
        run: str = "",
    ) -> None:
        self._training, self._scheduler, self._recipe = training, scheduler, recipe
        self._store, self._journal = store, journal
        self._identity, self._run = identity, run
        self._lock = threading.Lock()
        self._progress: dict[str, CommitProgress] = {}
        self._over = False

    def begin(self, peer: str, request: pb.Begin) -> Answer:
        """Start a round of one silo; answered once the trunk has saved its state.

        A round beyond the recipe's last starts nothing and ends the rounds of all silos.

        Raises:
            NotSupportedError: the round has no fixed number of steps.
            ProtocolError: the silo is not among the participants, or the recipe has no such round; or nothing is shown
                for the version.
            IdentityError: the root did not sign that the version is there.
        """
        if request.open:
            raise _no_open_rounds()
        if peer not in request.participants:
            raise ProtocolError(
                f"{peer} does not take part in round {request.round}", remedy="ask the root for the next plan"
            )
        version = request.round - 1
        if version > self._recipe.train.rounds:
            raise ProtocolError(
                f"{peer} begins version {version}; the recipe has {self._recipe.train.rounds}",
                remedy="ask the root for the next plan",
            )
        if self._identity is not None:
            verify_version(self._identity, request.published, self._run, version)

        def begin() -> pb.Begun:
            self._training.forget(peer)
            self._training.begin(peer, request.round)
            if version > self._store.last_round():
                self._training.save(version)
            return pb.Begun()

        log.info("trunk: %s begins round %d", peer, request.round)
        with self._lock:
            self._over = self._over or version >= self._recipe.train.rounds
            self._progress[peer] = CommitProgress(request.round)
            return self._scheduler.submit_urgent(begin)

    def end(self, peer: str, request: pb.End) -> Answer:
        """Raises ``NotSupportedError``: there are no open rounds here."""
        raise _no_open_rounds()

    def forget(self, peer: str) -> None:
        """Nothing to note of another process of a silo: what the earlier one stepped stays."""

    def commit(self, peer: str, request: pb.Commit) -> Answer:
        """Take one step with this silo's gradients; answered once the adapter has stepped.

        Raises:
            RoundLostError: the silo has not begun this round here, or the last version is published.
            OutOfOrderError: the step is not the silo's next one.
            ProtocolError: it claims more tokens than are in the silo's gradients.
        """

        def step() -> pb.Stepped:
            rate = self._recipe.rate([(self._recipe.round_steps(peer, request.round), request.step)])
            self._training.step({peer: request.weight}, together=False, rate=rate)
            self._journal.append({"round": request.round, "step": request.step, "silos": [peer]})
            return pb.Stepped(contributors=1)

        with self._lock:
            progress = self._progress.get(peer)
            if self._over or progress is None or progress.round != request.round:
                raise round_lost(peer, request.round)
            check_next(request, progress.step, self._recipe.steps(peer))
            most = min(self._training.counted(peer), self._recipe.train.step_tokens)
            check_weight(peer, request.weight, most)
            progress.step = request.step
            return self._scheduler.submit_urgent(step)


def _no_open_rounds() -> NotSupportedError:
    return NotSupportedError(
        "a federation with a buffer (federation.asynchronous) cannot be trained by a loop of your own",
        remedy="use a recipe without federation.asynchronous, or train with 'isthmus silo'",
    )
