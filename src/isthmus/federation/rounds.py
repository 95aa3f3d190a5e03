"""Rounds as a state machine: gather silos, let them train, combine what they learned; again, until finished."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterable

import torch

from isthmus.errors import IsthmusError, ProtocolError, QuorumError, RoundLostError
from isthmus.federation.lora import AGGREGATIONS
from isthmus.recipe import Recipe
from isthmus.report.record import RoleDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.barrier import Barrier
from isthmus.wire.channel import Answer

Contribution = tuple[float, dict[str, torch.Tensor]]


class Phase(enum.Enum):
    GATHERING = "gathering"
    TRAINING = "training"
    FINISHED = "finished"
    FAILED = "failed"


class Rounds:
    """Every request changes the phase under one lock; a round that ends is on disk before anyone hears of it.

    Args:
        shapes: of the shared adapter tensors, by uncut name. They start at zero, as LoRA's B does.
        store: where the tensors after each round are kept; the last ones there are continued from.
    """

    def __init__(self, recipe: Recipe, shapes: dict[str, tuple[int, ...]], store: RoleDirectory) -> None:
        self.phase = Phase.GATHERING
        self._error: IsthmusError | None = None
        """Why the phase is ``FAILED``; every silo that asks is told."""
        self._recipe = recipe
        self._shapes = shapes
        self._store = store
        self._journal = store.journal("metrics")
        self._aggregation = AGGREGATIONS[recipe.federation.lora]
        self._lock = threading.RLock()
        self.completed = store.last_round()
        self._shared: dict[str, torch.Tensor] = (
            store.load_round(self.completed)["shared"]
            if self.completed
            else {name: torch.zeros(shape) for name, shape in shapes.items()}
        )
        self._waiting: dict[str, Answer] = {}
        self._participants: list[str] = []
        """Of the round under way, those that have not contributed yet."""
        self._contributions: dict[str, Contribution] = {}
        self._patience = recipe.root.patience
        self._turn = 0
        self._gather(silo.name for silo in recipe.silo)

    def ready(self, peer: str) -> Answer:
        """A silo asks for work; answered with a plan once the next round begins, or the federation is over."""
        answer: Answer = Answer()
        with self._lock:
            self._waiting[peer] = answer
            if self.phase is Phase.TRAINING and peer in self._participants:
                self._lose(peer)
            self._advance()
        return answer

    def update(self, peer: str, request: pb.Update) -> Answer:
        """A silo's contribution to the round under way; with weight 0 it has none, and sends no tensors.

        Raises:
            RoundLostError: no such round is under way.
            ProtocolError: the silo is no participant or has contributed already.
            FrameError: tensors other than the shared ones.
        """
        with self._lock:
            if self.phase is not Phase.TRAINING or request.round != self.completed + 1:
                raise RoundLostError(f"an update for round {request.round}", remedy="ask for the next plan")
            if peer not in self._participants:
                raise ProtocolError(f"{peer} is no participant of round {request.round}", remedy="ask for a plan")
            tensors = codec.decode_named(request.tensors, self._shapes) if request.weight else {}
            self._participants.remove(peer)
            self._contributions[peer] = (request.weight, tensors)
            self._updates.arrive(peer, None)
        answer: Answer = Answer()
        answer.set_result(pb.Accepted())
        return answer

    def _advance(self) -> None:
        """Hand out what the phase has for the silos that wait."""
        with self._lock:
            if self.phase is Phase.GATHERING and self.completed >= self._recipe.train.rounds:
                self.phase = Phase.FINISHED
            if self.phase is Phase.FINISHED:
                self._answer(list(self._waiting), 0)
            elif self.phase is Phase.FAILED:
                assert self._error is not None
                self._give_up(self._error)
            elif self.phase is Phase.GATHERING:
                self._gathering.expect(self._gathering.expected | self._waiting.keys())
                for peer in list(self._waiting):
                    self._gathering.arrive(peer, None)

    def _gather(self, peers: Iterable[str]) -> None:
        """Wait for these, and for whoever else asks, to begin the next round."""
        self.phase = Phase.GATHERING
        self._gathering = self._barrier(lambda arrived: self._begin(sorted(arrived)))
        self._gathering.expect(peers)
        self._advance()

    def _begin(self, participants: list[str]) -> None:
        if len(participants) < self._recipe.minimum:
            self._fail(len(participants))
            return
        self.phase = Phase.TRAINING
        self._participants, self._contributions = participants, {}
        self._updates = self._barrier(lambda _: self._end(self._contributions))
        self._updates.expect(participants)
        self._answer(list(participants), self.completed + 1)

    def _lose(self, peer: str) -> None:
        """A participant asks instead of contributing: its process is a new one, what it trained is gone."""
        self._participants.remove(peer)
        self._updates.dismiss(peer)
        if not self._participants and not self._contributions:
            self._gather(self._waiting)

    def _end(self, contributions: dict[str, Contribution]) -> None:
        if len(contributions) < self._recipe.minimum:
            self._fail(len(contributions))
            return
        try:
            self._finish_round(contributions)
        except IsthmusError as error:
            self._give_up(error)
        else:  # who was silent had its time: the next round does not wait for it again
            self._gather(contributions)

    def _barrier(self, fire: Callable[[dict[str, None]], None]) -> Barrier[None]:
        """A barrier for the phase that begins; when its patience ends just as the phase does, nothing happens."""
        self._turn += 1
        turn = self._turn

        def fire_in_turn(arrived: dict[str, None]) -> None:
            with self._lock:
                if turn == self._turn:
                    fire(arrived)

        return Barrier(self._patience, fire_in_turn)

    def _finish_round(self, contributions: dict[str, Contribution]) -> None:
        number = self.completed + 1
        ordered = [contributions[peer] for peer in sorted(contributions)]
        shared = self._aggregation.combine(self._shared, ordered)
        self._store.save_round(number, {"shared": shared})
        weights = {peer: weight for peer, (weight, _) in sorted(contributions.items())}
        self._journal.append({"round": number, "weights": weights})
        self._shared, self.completed = shared, number

    def _answer(self, peers: list[str], round: int) -> None:
        plan = pb.Plan(
            round=round,
            completed=self.completed,
            participants=peers if round else [],
            adapters=codec.encode_named(self._shared),
        )
        for peer in peers:
            self._waiting.pop(peer).set_result(plan)

    def _fail(self, present: int) -> None:
        self._give_up(
            QuorumError(
                f"{present} silos are left, the recipe needs {self._recipe.minimum}",
                remedy="start the missing silos, then continue with 'isthmus run --resume'",
            )
        )

    def _give_up(self, error: IsthmusError) -> None:
        with self._lock:
            self.phase, self._error = Phase.FAILED, error
            self._turn += 1
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.set_exception(error)
