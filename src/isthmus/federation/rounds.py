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
            tensors = codec.decode_named(request.tensors, self._shapes)
            self._participants.remove(peer)
        self._updates.arrive(peer, (request.weight, tensors))
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

    def _begin(self, arrived: dict[str, None]) -> None:
        with self._lock:
            if len(arrived) < self._recipe.minimum:
                self._fail(len(arrived))
                return
            self.phase = Phase.TRAINING
            self._participants = sorted(arrived)
            self._updates.expect(arrived)
            self._answer(self._participants, self.completed + 1)

    def _end(self, contributions: dict[str, Contribution]) -> None:
        with self._lock:
            if len(contributions) < self._recipe.minimum:
                self._fail(len(contributions))
                return
            for silent in self._participants:  # it had its time; the next round does not wait for it again
                self._gathering.dismiss(silent)
            try:
                self._finish_round(contributions)
            except IsthmusError as error:
                self._give_up(error)
            else:
                self._advance()

    def _finish_round(self, contributions: dict[str, Contribution]) -> None:
        number = self.completed + 1
        ordered = [contributions[peer] for peer in sorted(contributions)]
        shared = self._aggregation.combine(self._shared, ordered)
        self._store.save_round(number, {"shared": shared})
        weights = {peer: weight for peer, (weight, _) in sorted(contributions.items())}
        self._journal.append({"round": number, "weights": weights})
        self._shared, self.completed, self.phase = shared, number, Phase.GATHERING

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
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.set_exception(error)
