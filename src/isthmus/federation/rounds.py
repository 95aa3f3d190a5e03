"""Rounds as a state machine: gather silos, let them train, combine what they learned; again, until finished."""

from __future__ import annotations

import enum
import threading

import torch

from isthmus.errors import IsthmusError, OutOfOrderError, ProtocolError, QuorumError
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
        self._contributed: dict[str, Contribution] = {}
        self._participants: list[str] = []
        patience = recipe.root.patience
        self._gathering: Barrier[None] = Barrier(patience, self._begin)
        self._gathering.expect(silo.name for silo in recipe.silo)
        self._updates: Barrier[Contribution] = Barrier(patience, self._end)
        self._advance()

    def ready(self, peer: str) -> Answer:
        """A silo asks for work; answered with a plan once the next round begins, or the federation is over."""
        answer: Answer = Answer()
        with self._lock:
            self._waiting[peer] = answer
        self._advance()
        return answer

    def update(self, peer: str, request: pb.Update) -> Answer:
        """A silo's contribution to the round under way.

        Raises:
            ProtocolError: no such round, or the silo is no participant or has contributed already.
            FrameError: tensors other than the shared ones.
        """
        with self._lock:
            if self.phase is not Phase.TRAINING or request.round != self.completed + 1:
                raise OutOfOrderError(f"an update for round {request.round}", remedy="ask for the next plan")
            if peer not in self._participants:
                raise ProtocolError(f"{peer} is no participant of round {request.round}", remedy="ask for a plan")
            self._participants.remove(peer)
        tensors = codec.decode_named(request.tensors, self._shapes)
        self._updates.arrive(peer, (request.weight, tensors))
        answer: Answer = Answer()
        answer.set_result(pb.Accepted())
        return answer

    def _advance(self) -> None:
        """Hand out what the phase has for the silos that wait."""
        with self._lock:
            if self.phase is Phase.GATHERING and self.completed >= self._recipe.train.rounds:
                self.phase = Phase.FINISHED
            phase, waiting = self.phase, dict(self._waiting)
            if phase is Phase.FINISHED:
                self._waiting.clear()
        if phase is Phase.FINISHED:
            self._answer(waiting, 0)
        elif phase is Phase.FAILED:
            self._fail(0)
        elif phase is Phase.GATHERING:
            for peer in waiting:
                self._gathering.arrive(peer, None)

    def _begin(self, arrived: dict[str, None]) -> None:
        with self._lock:
            enough = len(arrived) >= self._recipe.minimum
            if enough:
                self.phase = Phase.TRAINING
                self._participants = sorted(arrived)
                self._updates.expect(arrived)
                starting = {peer: self._waiting.pop(peer) for peer in arrived if peer in self._waiting}
        if enough:
            self._answer(starting, self.completed + 1)
        else:
            self._fail(len(arrived))

    def _end(self, contributions: dict[str, Contribution]) -> None:
        if len(contributions) < self._recipe.minimum:
            self._fail(len(contributions))
            return
        number = self.completed + 1
        ordered = [contributions[peer] for peer in sorted(contributions)]
        shared = self._aggregation.combine(self._shared, ordered)
        try:
            self._store.save_round(number, {"shared": shared})
            weights = {peer: weight for peer, (weight, _) in sorted(contributions.items())}
            self._journal.append({"round": number, "weights": weights})
        except IsthmusError as error:
            self._give_up(error)
            return
        with self._lock:
            self._shared = shared
            self.completed = number
            self.phase = Phase.GATHERING
        self._advance()

    def _answer(self, waiting: dict[str, Answer], round: int) -> None:
        plan = pb.Plan(
            round=round,
            completed=self.completed,
            participants=sorted(waiting) if round else [],
            adapters=codec.encode_named(self._shared),
        )
        for answer in waiting.values():
            answer.set_result(plan)

    def _fail(self, present: int) -> None:
        self._give_up(
            QuorumError(
                f"{present} silos are left, the recipe needs {self._recipe.minimum}",
                remedy="start the missing silos, then continue with 'isthmus run --resume'",
            )
        )

    def _give_up(self, error: IsthmusError) -> None:
        with self._lock:
            self.phase = Phase.FAILED
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.set_exception(error)
