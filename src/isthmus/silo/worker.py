"""The worker: one silo's whole part in a federation, from joining to the last plan."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress

import torch

from isthmus.errors import RoundLostError, RunError, UnknownStepError
from isthmus.model import adapters
from isthmus.model.optim import build_optimizer
from isthmus.privacy.ledger import FileLedger
from isthmus.recipe import Recipe
from isthmus.report.record import RoleDirectory, read_journal
from isthmus.silo.data import Batch
from isthmus.silo.join import connect, join, known_data
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import Step, evaluate, train_step, training_batches
from isthmus.silo.update import build_update
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Channel

LOSSES = 5
"""Rounds lost in a row after which a silo gives up."""
log = logging.getLogger(__name__)


class Worker:
    """Trains and measures on one silo's rows, round by round, as the root plans.

    Args:
        directory: where metrics, ledger, released examples and optimizer states go. They never leave the silo.
        trunk, root: ways there other than the recipe's addresses.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        directory: RoleDirectory,
        *,
        trunk: Channel | None = None,
        root: Channel | None = None,
    ) -> None:
        self._recipe = recipe
        self._name = name
        self._directory = directory
        ledger, releases = FileLedger(directory.path / "ledger.jsonl"), directory.path / "released"
        register = directory.path / "register"
        self._silo = join(recipe, name, ledger=ledger, channel=trunk, releases=releases, register=register)
        self._data = known_data(recipe, name, self._silo)
        self._root = root or connect(recipe, name, "Root", recipe.root.address)
        self._parameters = {
            key: tensor for part in self._silo.parts for key, tensor in adapters.trainable(part).items()
        }
        self._shapes = adapters.shared_shapes(self._silo.parts)
        self._optimizer = build_optimizer(self._parameters.values(), recipe.train)
        self._state_of_round: int | None = 0
        """The round whose end the optimizer is at; None within a round."""
        self._journal = directory.journal("metrics")
        self._measured = {
            line["round"] for line in read_journal(directory.path / "metrics.jsonl") if line["event"] == "evaluation"
        }

    def run(self) -> None:
        """Take part until the federation is finished."""
        completed, losses = self._directory.last_round(), 0
        while True:
            plan: pb.Plan = self._root.call(pb.Ready(completed=completed))
            shared = codec.decode_named(plan.adapters, self._shapes)
            self._load(shared)
            self._measure(plan.completed)
            if not plan.round:
                break
            try:
                self._train(plan, shared)
            except (RoundLostError, UnknownStepError) as lost:  # the trunk started again, or went on without us
                log.warning("round %d is lost: %s; asking for the next plan", plan.round, lost.message)
                losses += 1
                if losses > LOSSES:
                    raise
            else:
                completed, losses = plan.round, 0

    def close(self) -> None:
        self._silo.close()
        self._root.close()

    def _train(self, plan: pb.Plan, shared: Mapping[str, torch.Tensor]) -> None:
        """One round: local steps together with the other silos, then this silo's update."""
        train = self._recipe.train
        self._continue_from(plan.completed)
        self._state_of_round = None
        self._silo.trunk.begin(plan.round, list(plan.participants))
        batches = training_batches(self._data, train.batch, f"{self._recipe.seed}/{self._name}/{plan.round}")
        weight = 0
        for number in range(1, train.steps + 1):
            step = self._step(next(batches))
            self._silo.trunk.commit(plan.round, number, step.weight)
            weight += step.weight
            self._note_step(plan.round, number, step)
        self._directory.save_round(plan.round, {"optimizer": self._optimizer.state_dict()})
        self._state_of_round = plan.round
        self._root.call(build_update(self._silo.boundary, shared, self._parameters, round=plan.round, weight=weight))

    def _step(self, batch: Batch) -> Step:
        micro_batches = self._recipe.train.micro_batches
        if micro_batches == 1:
            return train_step(self._silo.model, self._optimizer, batch)
        return pipelined_step(self._silo.model, self._optimizer, batch, micro_batches)

    def _continue_from(self, completed: int) -> None:
        """Bring the optimizer to its state after this round; a silo that has none of it starts afresh."""
        if self._state_of_round == completed:
            return
        self._optimizer = build_optimizer(self._parameters.values(), self._recipe.train)
        with suppress(RunError):
            self._optimizer.load_state_dict(self._directory.load_round(completed)["optimizer"])
        self._state_of_round = completed

    @torch.no_grad()
    def _load(self, shared: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in shared.items():
            self._parameters[name].copy_(tensor)

    def _measure(self, completed: int) -> None:
        """Held-out quality of what the rounds so far have reached; before the first, of the untrained model."""
        if not self._recipe.train.evaluate or not self._data.held_out or completed in self._measured:
            return
        started = time.perf_counter()
        scores = evaluate(self._silo.model, self._data)
        self._measured.add(completed)
        seconds = round(time.perf_counter() - started, 3)
        self._journal.append({"event": "evaluation", "round": completed, "seconds": seconds, **scores})

    def _note_step(self, round: int, number: int, step: Step) -> None:
        channel = self._silo.trunk.channel
        self._journal.append(
            {
                "event": "step",
                "round": round,
                "step": number,
                "loss": step.loss,
                "tokens": step.tokens,
                "seconds": float(f"{step.seconds:.3f}"),
                "sent_bytes": channel.sent_bytes,
                "received_bytes": channel.received_bytes,
            }
        )
