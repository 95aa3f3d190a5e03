"""The worker: one silo's whole part in a federation, from joining to the last plan."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from isthmus.errors import RoundLostError, RunError, UnknownStepError
from isthmus.model import adapters
from isthmus.model.optim import build_optimizer
from isthmus.recipe import Recipe
from isthmus.report.record import RoleDirectory, read_journal
from isthmus.silo.data import Tokens, batches, collate
from isthmus.silo.held import open_ledger
from isthmus.silo.join import connect, join, known_data
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import Step, evaluate, scored, train_step
from isthmus.silo.update import updates
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
        self._silo = join(
            recipe,
            name,
            ledger=open_ledger(directory, recipe, name),
            channel=trunk,
            releases=directory.path / "released",
            register=directory.path / "register",
        )
        self._data = known_data(recipe, name, self._silo)
        self._root = root or connect(recipe, name, "Root", recipe.root.address)
        self._updates = updates(recipe, name, self._silo.boundary, self._root)
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
            plan: pb.Plan = self._root.call(pb.Ready(completed=completed, keys=self._updates.offer()))
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
        self._updates.begin(plan)
        self._silo.trunk.begin(plan.round, list(plan.participants))
        drawn = batches(self._data.train, train.batch, f"{self._recipe.seed}/{self._name}/{plan.round}")
        weight, rows = 0, 0
        for number in range(1, train.steps + 1):
            step = self._step(batch := next(drawn))
            rows += len(batch) - step.skipped
            self._silo.trunk.commit(plan.round, number, step.weight)
            weight += step.weight
            self._note_step(plan.round, number, step)
        if not self._silo.boundary.update_affordable():
            log.warning("round %d: the privacy budget does not bear an update", plan.round)
            weight = 0
        change = {name: self._parameters[name].detach() - tensor for name, tensor in shared.items()}
        try:
            update = self._updates.pack(plan, change, weight, rows / (train.steps * train.batch))
        finally:  # the steps were made, even if the round went on without them
            self._directory.save_round(plan.round, self._state())
            self._state_of_round = plan.round
        self._updates.send(update)

    def _step(self, drawn: list[Tokens]) -> Step:
        """One step on those of the drawn rows whose privacy budgets bear it whole; on none of them, an empty one."""
        borne = self._affordable(drawn)
        rows = [row for row, bears in zip(drawn, borne, strict=True) if bears]
        skipped = len(drawn) - len(rows)
        if not rows:
            return Step(None, 0, 0, 0.0, skipped)
        batch, micro_batches = collate(rows, self._data.pad), self._recipe.train.micro_batches
        if micro_batches == 1:
            step = train_step(self._silo.model, self._optimizer, batch)
        else:
            step = pipelined_step(self._silo.model, self._optimizer, batch, micro_batches)
        return replace(step, skipped=skipped)

    def _affordable(self, rows: list[Tokens], *, train: bool = True) -> list[bool]:
        lengths = [row.crossing(self._recipe.boundary.tail) for row in rows]
        return self._silo.trunk.affordable([row.input for row in rows], lengths, train=train)

    def _continue_from(self, completed: int) -> None:
        """Bring optimizer, guard and updates to their state after this round; a silo without it starts afresh."""
        if self._state_of_round == completed:
            return
        self._optimizer = build_optimizer(self._parameters.values(), self._recipe.train)
        state: dict[str, Any] = {}
        with suppress(RunError):
            state = self._directory.load_round(completed)
            self._optimizer.load_state_dict(state["optimizer"])
        if self._silo.guard is not None:
            self._silo.guard.load_state_dict(state.get("guard", {}))
        self._updates.load_state_dict(state.get("updates", {}))
        self._state_of_round = completed

    def _state(self) -> dict[str, Any]:
        """What this silo alone keeps from round to round."""
        guard = self._silo.guard
        return {
            "optimizer": self._optimizer.state_dict(),
            "guard": guard.state_dict() if guard is not None else {},
            "updates": self._updates.state_dict(),
        }

    @torch.no_grad()
    def _load(self, shared: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in shared.items():
            self._parameters[name].copy_(tensor)

    def _measure(self, completed: int) -> None:
        """Held-out quality of what the rounds so far have reached; before the first, of the untrained model."""
        if not self._recipe.train.evaluate or not self._data.held_out or completed in self._measured:
            return
        self._measured.add(completed)
        started, rows = time.perf_counter(), self._measurable()
        if not rows:
            log.warning("after round %d nothing is measured: all held-out rows' privacy budgets are spent", completed)
            return
        scores: dict[str, float] = evaluate(self._silo.model, self._data, rows)
        seconds = round(time.perf_counter() - started, 3)
        line = {"event": "evaluation", "round": completed, "seconds": seconds, **scores}
        self._journal.append(line | _skipped(len(self._data.held_out) - len(rows)))

    def _measurable(self) -> list[Tokens]:
        """The held-out rows whose privacy budgets bear measuring on them."""
        owners = [(row, tokens) for row in self._data.held_out for tokens in scored(self._data, row)]
        borne = self._affordable([tokens for _, tokens in owners], train=False)
        spent = {id(row) for (row, _), bears in zip(owners, borne, strict=True) if not bears}
        return [row for row in self._data.held_out if id(row) not in spent]

    def _note_step(self, round: int, number: int, step: Step) -> None:
        channel, epsilon = self._silo.trunk.channel, self._silo.boundary.budget.epsilon
        guard = self._silo.guard
        told = {"told": asdict(guard.told)} if guard is not None else {}
        self._journal.append(
            _skipped(step.skipped)
            | told
            | {
                "event": "step",
                "round": round,
                "step": number,
                "loss": step.loss,
                "tokens": step.tokens,
                "seconds": float(f"{step.seconds:.3f}"),
                "sent_bytes": channel.sent_bytes,
                "received_bytes": channel.received_bytes,
                "epsilon": epsilon if math.isfinite(epsilon) else None,
            }
        )


def _skipped(rows: int) -> dict[str, object]:
    """Rows left out for their budgets, as a journal's line tells it."""
    return {"skipped": rows} if rows else {}
