"""Rounds as a state machine: gather silos, let them train, combine what they learned; again, until finished."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterable, Mapping

import torch

from isthmus.errors import IsthmusError, ProtocolError, QuorumError, RoundLostError
from isthmus.federation.collection import Collected, Collection, Masked, Open
from isthmus.federation.masking import Advert
from isthmus.federation.quantize import Ring
from isthmus.federation.strategies.strategy import Strategy
from isthmus.model.flat import Layout
from isthmus.recipe import Recipe
from isthmus.report.record import RoleDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.barrier import Barrier
from isthmus.wire.channel import Answer


class Phase(enum.Enum):
    GATHERING = "gathering"
    TRAINING = "training"
    FINISHED = "finished"
    FAILED = "failed"


class Rounds:
    """Every request changes the phase under one lock; a round that ends is on disk before anyone hears of it.

    Args:
        initial: the shared adapter tensors, by uncut name, as every silo starts with them.
        store: where the tensors after each round are kept; the last ones there are continued from.
    """

    def __init__(self, recipe: Recipe, initial: Mapping[str, torch.Tensor], store: RoleDirectory) -> None:
        self.phase = Phase.GATHERING
        self._error: IsthmusError | None = None
        """Why the phase is ``FAILED``; every silo that asks is told."""
        self._recipe = recipe
        self._layout = Layout({name: tuple(tensor.shape) for name, tensor in initial.items()})
        self._store = store
        self._journal = store.journal("metrics")
        self._strategy = Strategy(recipe.federation)
        self._lock = threading.RLock()
        self.completed = store.last_round()
        self._shared: dict[str, torch.Tensor] = dict(initial)
        if self.completed:
            state = store.load_round(self.completed)
            self._shared = state["shared"]
            self._strategy.load_state_dict(state.get("strategy", {}))
        self._waiting: dict[str, Answer] = {}
        self._keys: dict[str, pb.SumKeys] = {}
        """What the silos that wait offered for a masked sum."""
        self._collection: Collection | None = None
        """Of the round under way."""
        self._patience = recipe.root.patience
        self._turn = 0
        self._gather(silo.name for silo in recipe.silo)

    def ready(self, peer: str, keys: pb.SumKeys | None = None) -> Answer:
        """A silo asks for work; answered with a plan once the next round begins, or the federation is over.

        Raises:
            ProtocolError: updates are to be masked, and it offers no keys.
        """
        answer: Answer = Answer()
        with self._lock:
            if self._recipe.federation.masks:
                if keys is None:
                    raise ProtocolError(f"{peer} offers no keys", remedy="give silo and root one recipe")
                self._keys[peer] = keys
            self._waiting[peer] = answer
            if self._collection is not None and self._collection.awaits(peer):
                self._lose(self._collection, peer)
            self._advance()
        return answer

    def contribute(self, peer: str, request: pb.Update | pb.Deal | pb.Reveal) -> Answer:
        """A silo's message to the round under way.

        Raises:
            RoundLostError: no such round is under way, or it has gone on without the silo.
            ProtocolError: the silo is no participant or has contributed already.
            FrameError: other tensors than the shared ones.
        """
        with self._lock:
            if self._collection is None or request.round != self.completed + 1:
                raise RoundLostError(f"an update for round {request.round}", remedy="ask for the next plan")
            return self._collection.handle(peer, request)

    def _advance(self) -> None:
        """Hand out what the phase has for the silos that wait."""
        with self._lock:
            if self.phase is Phase.GATHERING and self.completed >= self._recipe.train.rounds:
                self.phase = Phase.FINISHED
            if self.phase is Phase.FINISHED:
                self._answer(list(self._waiting), pb.Plan(completed=self.completed))
            elif self.phase is Phase.FAILED:
                assert self._error is not None
                self._give_up(self._error)
            elif self.phase is Phase.GATHERING:
                self._gathering.expect(self._gathering.expected | self._waiting.keys())
                for peer in list(self._waiting):
                    self._gathering.arrive(peer, None)

    def _gather(self, peers: Iterable[str]) -> None:
        """Wait for these, and for whoever else asks, to begin the next round."""
        self.phase, self._collection = Phase.GATHERING, None
        self._gathering = self._barrier(lambda arrived: self._begin(sorted(arrived)))
        self._gathering.expect(peers)
        self._advance()

    def _begin(self, participants: list[str]) -> None:
        if len(participants) < self._recipe.minimum:
            self._fail(len(participants))
            return
        self.phase = Phase.TRAINING
        plan = pb.Plan(round=self.completed + 1, completed=self.completed, participants=participants)
        if self._recipe.federation.masks:
            keys = {peer: self._keys.pop(peer) for peer in participants}
            self._collection = masked = self._masked(keys)
            plan.sum = masked.terms.context
            for peer, offered in keys.items():
                plan.keys[peer].CopyFrom(offered)
        else:
            self._collection = Open(participants, self._layout, self._barrier, self._end)
        self._answer(participants, plan)

    def _masked(self, keys: Mapping[str, pb.SumKeys]) -> Masked:
        adverts = {peer: Advert(one.sealing, one.masking, one.promise) for peer, one in keys.items()}
        ring = Ring(len(keys), self._recipe.federation.range)
        return Masked(adverts, self._layout, ring, self._barrier, self._end, fewest=self._recipe.minimum)

    def _lose(self, collection: Collection, peer: str) -> None:
        """A participant asks instead of contributing: its process is a new one, what it trained is gone."""
        if collection.lose(peer):
            self._gather(self._waiting)

    def _end(self, collected: Collected | IsthmusError) -> None:
        if isinstance(collected, IsthmusError):  # nothing is known of the sum: the same round again, with whoever comes
            self._gather(silo.name for silo in self._recipe.silo)
            return
        if len(collected.weights) < self._recipe.minimum:
            self._fail(len(collected.weights))
            return
        try:
            self._finish_round(collected)
        except IsthmusError as error:
            self._give_up(error)
        else:  # who was silent had its time: the next round does not wait for it again
            self._gather(collected.weights)

    def _barrier(self, fire: Callable[[dict[str, None]], None]) -> Barrier[None]:
        """A barrier for the phase that begins; when its patience ends just as the phase does, nothing happens."""
        self._turn += 1
        turn = self._turn

        def fire_in_turn(arrived: dict[str, None]) -> None:
            with self._lock:
                if turn == self._turn:
                    fire(arrived)

        return Barrier(self._patience, fire_in_turn)

    def _finish_round(self, collected: Collected) -> None:
        number = self.completed + 1
        shared = self._strategy.next(self._shared, collected.contributions)
        self._store.save_round(number, {"shared": shared, "strategy": self._strategy.state_dict()})
        self._journal.append({"round": number, "weights": collected.weights})
        self._shared, self.completed = shared, number

    def _answer(self, peers: list[str], plan: pb.Plan) -> None:
        plan.adapters.extend(codec.encode_named(self._shared))
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
            self.phase, self._collection, self._error = Phase.FAILED, None, error
            self._turn += 1
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.set_exception(error)
