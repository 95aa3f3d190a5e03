"""The worker: one silo in a federation, from joining to the last plan."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from isthmus.data.tokens import Tokens, collate
from isthmus.errors import RoundLostError, RunError, UnknownStepError
from isthmus.model import adapters
from isthmus.model.optim import restore_optimizer, set_rate
from isthmus.recipe import Recipe
from isthmus.silo import fairness
from isthmus.silo.accepted import check_round
from isthmus.silo.control import silo_control
from isthmus.silo.join import accepted_adapters, connect_silo, keep_shared, load_data
from isthmus.silo.local_steps import LocalSteps
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.secrets import open_ledger
from isthmus.silo.served import SharedAdapters
from isthmus.silo.trainer import Step, evaluate, train_step
from isthmus.silo.update import AggregatorClient
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.updates.flat import Layout
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Channel

LOSSES = 5
"""Rounds lost in a row after which a silo gives up."""
log = logging.getLogger(__name__)


class Worker:
    """Trains and measures on one silo's rows, round by round, as the root plans.

    Args:
        directory: the silo's own, for metrics, ledger, released examples and states. None of it leaves the silo.
        trunk: a channel to the trunk, in place of the recipe's address.
        root: a channel to the root, or to the silo's edge if it has one, in place of the recipe's address.
        endless: wait for servers that are away until they are there.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        directory: RoleDirectory,
        *,
        trunk: Channel | None = None,
        root: Channel | None = None,
        endless: bool = False,
    ) -> None:
        self._mean_reach = recipe.mean_reach
        self._recipe = recipe = recipe.of_silo(name)
        self._name = name
        alone = recipe.model_copy(update={"trunk": recipe.trunk.model_copy(update={"replicas": ()})})
        self._directory = directory
        with ExitStack() as undo:  # a silo that a server refuses leaves no ledger locked
            ledger = open_ledger(directory, recipe, name)
            undo.callback(ledger.close)
            self._silo = connect_silo(
                alone,  # replicas train nothing
                name,
                ledger=ledger,
                channel=trunk,
                releases=directory.path / "released",
                records=directory.path / "records",
                endless=endless,
            )
            undo.callback(self._silo.close)
            self._aggregator = AggregatorClient(recipe, name, self._silo.boundary, root, endless=endless)
            undo.pop_all()
        self._guard = self._silo.guard
        self._data = load_data(recipe, name, self._silo)
        self._read = self._data.measured_rows()
        """The held-out rows that evaluations read."""
        self._parameters = {
            key: tensor for part in self._silo.parts for key, tensor in adapters.trainable(part).items()
        }
        """The parameters that train in some round, by uncut name."""
        self._shapes = adapters.shared_shapes(self._silo.parts)
        self._accepted = accepted_adapters(recipe, self._silo, directory)
        count = sum(one.numel() for one in self._parameters.values())
        self._control = silo_control(recipe, name, count)
        self._gradients = recipe.sends_gradients
        """Whether updates are gradients."""
        self._local = LocalSteps(self._parameters, recipe.train, self._control, gradients=self._gradients)
        self._optimizer = self._local.optimizer()
        self._state_of_round: int | None = 0
        """The round at whose end the optimizer is; None within a round."""
        self._factor = 1.0
        """The factor of this silo's weight in its last round, by the recipe's fairness."""
        directory.keep_as(recipe.train)
        self._journal = directory.journal("metrics")
        self._measured = {
            line["round"] for line in read_journal(directory.path / "metrics.jsonl") if line["event"] == "evaluation"
        }

    def run(self) -> int:
        """Take part until the federation is finished, or its cut is to move. Returns the number of finished rounds."""
        completed, losses = self._directory.last_round(), 0
        while True:
            run = self._silo.trunk.channel.welcome.run
            plan = self._aggregator.ask(completed, run)
            shared = codec.decode_named(plan.adapters, self._shapes)
            received = SharedAdapters(plan.completed, run, shared)
            self._accepted.accept(received)
            check_round(plan, self._recipe.train.rounds)
            self._load(shared)
            keep_shared(self._directory, received)
            if self._recipe.federation.asynchronous.buffer is not None and not plan.round:
                # no silo trains on the last version, but the trunk must know that it is there
                self._silo.rounds.begin(plan.completed + 1, [self._name], published=plan.published)
            self._measure(plan.completed)
            if not plan.round:
                self._warn_of_nothing_learned()
                return plan.completed
            began = time.monotonic()
            log.info("round %d begins", plan.round, extra={"round": plan.round})
            try:
                self._train(plan, shared)
            except (RoundLostError, UnknownStepError) as lost:  # a server started again, or went on without this silo
                log.warning("round %d is lost: %s; asking for the next plan", plan.round, lost.message)
                losses += 1
                if losses > LOSSES:
                    raise
            else:
                completed, losses = plan.round, 0
                seconds = round(time.monotonic() - began, 3)
                told = {"round": completed, "seconds": seconds}
                log.info("round %d ended after %.1f s", completed, seconds, extra=told)

    def release_moments(self, round: int, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """An optimizer's moments on their way to the trunk, as an update leaves: through the boundary, with a line in
        the ledger.

        Args:
            round: the round at whose end they are.
            tensors: by any name.
        """
        layout, released = Layout.of(tensors), dict(tensors)

        def encode(row_P: torch.Tensor) -> pb.Update:
            released.update(layout.tensors(row_P))
            return pb.Update(tensors=codec.encode_named(released))

        if tensors:
            self._silo.boundary.release_update(layout.row(tensors), round, encode)
        return released

    def close(self) -> None:
        self._silo.close()
        self._aggregator.close()

    def _train(self, plan: pb.Plan, shared: Mapping[str, torch.Tensor]) -> None:
        """One round: local steps together with the other silos, then this silo's update."""
        train = self._recipe.train
        self._continue_from(plan.completed)
        self._state_of_round = None
        self._begin(plan)
        self._aggregator.begin(plan, Layout.of(self._trained()))
        own = self._data.round_steps(plan.round)
        steps_here = own if train.epochs is not None else None
        published = plan.published if plan.HasField("published") else None
        self._silo.rounds.begin(plan.round, list(plan.participants), steps_here, published)
        steps: list[Step] = []
        rates, batches = self._recipe.rates(own), self._data.round_batches(plan.round)
        for number, (rate, drawn) in enumerate(zip(rates, batches, strict=True), 1):
            set_rate(self._optimizer, rate)
            with adapters.dropout(self._silo.model, f"{self._recipe.seed}/{self._name}/{plan.round}/{number}"):
                steps.append(step := self._step(drawn))
            self._silo.rounds.commit(plan.round, number, step.weight)
            self._note_step(plan.round, number, step)
        self._weigh_fairly(plan.round, steps)
        weight, share = self._weights(steps, sum(map(len, batches)))
        if not self._aggregator.affordable():
            log.warning("round %d: the privacy budget does not allow an update", plan.round)
            weight = 0.0
        made = [rate for rate, step in zip(rates, steps, strict=True) if step.loss is not None]
        change = self._change(plan.round, shared, made)
        if not all(one.isfinite().all() for one in change.values()):
            log.error("round %d: training diverged, the update is not finite; nothing of it leaves", plan.round)
            change, weight = {name: torch.zeros_like(one) for name, one in change.items()}, 0.0
            self._optimizer = self._local.optimizer()  # its moments are not finite either
        try:
            update = self._aggregator.pack(plan, change, weight, share, self._quality() if weight else 0.0)
            if self._control is not None:
                self._control.end(plan.round, self._aggregator.received())
        finally:  # the steps were made, even if the round went on without them
            self._directory.save_round(plan.round, self._state())
            self._state_of_round = plan.round
        self._note_update(plan, update)
        self._aggregator.send(update)

    def _change(
        self, round: int, shared: Mapping[str, torch.Tensor], rates: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """New minus old of the tensors that train in this round, normalized to the silos' mean reach, if the recipe
        says so; or the gradients of the round's one step, with the sign reversed.

        Args:
            rates: the learning rate of each step that was made.
        """
        if self._gradients:
            return {name: _descent(one) for name, one in self._trained().items()}
        change = {name: one.detach().cpu() - shared[name] for name, one in self._trained().items()}
        reach = self._recipe.train.reach(rates)
        if not self._recipe.federation.normalized or not reach:
            return change
        scale = self._mean_reach(round) / reach
        return {name: scale * one for name, one in change.items()}

    def _weigh_fairly(self, round: int, steps: Sequence[Step]) -> None:
        """Set the factor of this silo's weight by its loss, as the recipe's fairness says."""
        section = self._recipe.federation.fairness
        if section.kind == "none":
            return
        loss = fairness.starting_loss([step.loss for step in steps])
        self._factor = fairness.factor(section, loss, self._factor)
        self._journal.append({"event": "fairness", "round": round, "loss": loss, "factor": self._factor})

    def _weights(self, steps: Sequence[Step], planned: int) -> tuple[float, float]:
        """This silo's weight in an open round, and its share in a masked one, from its steps.

        Args:
            planned: rows of the round's batches.
        """
        tokens = sum(step.weight for step in steps)
        if self._recipe.federation.weights.kind == "equal":
            return (self._factor if tokens else 0.0), self._factor
        rows = planned - sum(step.skipped for step in steps)
        return self._factor * tokens, self._factor * rows / planned

    def _quality(self) -> float:
        """The model's quality on held-out rows, if the root weighs by it: accuracy, or one over the perplexity. 0 if no
        row's privacy budget allows measuring."""
        rows = self._measurable() if self._recipe.federation.weights.kind == "quality" else []
        if not rows:
            return 0.0
        with self._silo.boundary.evaluating():
            scores = evaluate(self._silo.model, self._data, rows)
        return scores["accuracy"] if "accuracy" in scores else 1 / scores["perplexity"]

    def _step(self, drawn: list[Tokens]) -> Step:
        """One step on those of the drawn rows whose privacy budget allows all of it; without any, an empty step."""
        allowed = self._affordable(drawn)
        rows = [row for row, fits in zip(drawn, allowed, strict=True) if fits]
        skipped = len(drawn) - len(rows)
        if not rows:
            return Step(None, 0, 0, 0.0, skipped)
        batch, micro_batches = collate(rows, self._data.pad), self._recipe.train.micro_batches
        batch = batch.to(self._silo.model.device)

        def take(optimizer: torch.optim.Optimizer) -> Step:
            if micro_batches == 1:
                return train_step(self._silo.model, optimizer, batch)
            return pipelined_step(self._silo.model, optimizer, batch, micro_batches)

        step = self._local.take(take, self._optimizer, self._silo.trunk)
        return replace(step, skipped=skipped)

    def _affordable(self, rows: list[Tokens], *, train: bool = True) -> list[bool]:
        """For each row, whether the privacy budgets allow a training step with it, or one forward alone."""
        recipe = self._recipe
        if not self._silo.boundary.limited:
            return [True] * len(rows)
        forwards, gradients = recipe.step_releases if train else (1, 0)
        lengths = [row.crossing(recipe.boundary.tail) for row in rows]
        inputs = [row.input for row in rows]
        return self._silo.boundary.affordable(inputs, lengths, forwards=forwards, gradients=gradients)

    def _continue_from(self, completed: int) -> None:
        """Restore the silo's state after this round, or after the last one before it that this silo took part in; the
        initial state, if there is none."""
        completed = self._directory.last_round(completed)
        if self._state_of_round == completed:
            return
        self._optimizer = self._local.optimizer()
        state: dict[str, Any] = {}
        with suppress(RunError):
            state = self._directory.load_round(completed)
        if state:
            restore_optimizer(self._optimizer, state["optimizer"])
        if self._guard is not None:
            self._guard.load_state_dict(state.get("guard", {}))
        self._aggregator.load_state_dict(state.get("updates", {}))
        self._factor = state.get("factor", 1.0)
        if self._control is not None:
            self._control.load_state_dict(state.get("control", {}))
        self._state_of_round = completed

    def _begin(self, plan: pb.Plan) -> None:
        """Begin a round's local steps from the plan's tensors."""
        self._optimizer.zero_grad()
        self._select_trained(plan.round)
        self._local.begin()
        if self._control is not None:
            self._control.begin(plan, self._trained())

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that train in this round, by uncut name."""
        return {name: one for name, one in self._parameters.items() if one.requires_grad}

    def _select_trained(self, round: int) -> None:
        """Freeze the parameters that do not train in this round; the optimizer skips them and keeps their state."""
        trained = adapters.select_factors(
            self._parameters, adapters.trained_factors(self._recipe.federation.lora, round)
        )
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in trained)
            if self._recipe.federation.lora == "svd" and "lora_" in name:
                self._optimizer.state.pop(parameter, None)  # the root's factors are new ones: moments were of others

    def _state(self) -> dict[str, Any]:
        """The state that this silo alone keeps from round to round."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "guard": self._guard.state_dict() if self._guard is not None else {},
            "updates": self._aggregator.state_dict(),
            "factor": self._factor,
        } | ({"control": self._control.state_dict()} if self._control is not None else {})

    @torch.no_grad()
    def _load(self, shared: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in shared.items():
            self._parameters[name].copy_(tensor)

    def _measure(self, completed: int) -> None:
        """Measure and record the quality on held-out rows after so many rounds; after none, of the untrained model."""
        if not self._recipe.train.evaluates_after(completed) or not self._read or completed in self._measured:
            return
        self._measured.add(completed)
        channel = self._silo.trunk.channel
        started, rows, before = time.perf_counter(), self._measurable(), (channel.sent_bytes, channel.received_bytes)
        if not rows:
            log.warning("after round %d nothing is measured: all held-out rows' privacy budgets are spent", completed)
            return
        with self._silo.boundary.evaluating():
            scores: dict[str, float] = evaluate(self._silo.model, self._data, rows)
        seconds = round(time.perf_counter() - started, 3)
        line = {"event": "evaluation", "round": completed, "seconds": seconds, **scores}
        crossed = {
            "sent_bytes": channel.sent_bytes,
            "received_bytes": channel.received_bytes,
            "own_sent_bytes": channel.sent_bytes - before[0],
            "own_received_bytes": channel.received_bytes - before[1],
            "epsilon": _finite(self._silo.boundary.budget.evaluations.quick_worst()),
        }
        self._journal.append(line | crossed | _skipped(len(self._read) - len(rows)))

    def _measurable(self) -> list[Tokens]:
        """The held-out rows whose privacy budgets allow measuring on them."""
        owners = [(row, tokens) for row in self._read for tokens in self._data.evaluation_inputs(row)]
        allowed = self._affordable([tokens for _, tokens in owners], train=False)
        spent = {id(row) for (row, _), fits in zip(owners, allowed, strict=True) if not fits}
        return [row for row in self._read if id(row) not in spent]

    def _note_step(self, round: int, number: int, step: Step) -> None:
        channel, epsilon = self._silo.trunk.channel, self._silo.boundary.budget.epsilon
        defence = {} if self._guard is None else {"guard_terms": asdict(self._guard.last_terms)}
        self._journal.append(
            _skipped(step.skipped)
            | defence
            | {
                "event": "step",
                "round": round,
                "step": number,
                "loss": step.loss,
                "tokens": step.tokens,
                "seconds": float(f"{step.seconds:.3f}"),
                "sent_bytes": channel.sent_bytes,
                "received_bytes": channel.received_bytes,
                "epsilon": _finite(epsilon),
            }
        )

    def _warn_of_nothing_learned(self) -> None:
        """The run goes on without a silo whose budgets allow no row; whoever looks after it should know."""
        steps = [line for line in read_journal(self._directory.path / "metrics.jsonl") if line["event"] == "step"]
        if steps and all(line["loss"] is None for line in steps):
            log.warning("this silo learned nothing: its privacy budgets allowed no row in any step")

    def _note_update(self, plan: pb.Plan, update: pb.Update) -> None:
        """What goes to the aggregator in this round, and what came from it."""
        sizes = {"own_sent_bytes": update.ByteSize(), "own_received_bytes": plan.ByteSize()}
        self._journal.append({"event": "update", "round": plan.round, **sizes})


def _descent(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A parameter's gradient with the sign reversed; zeros if no row gave one."""
    return (torch.zeros_like(parameter) if parameter.grad is None else -parameter.grad).detach().cpu()


def _finite(epsilon: float) -> float | None:
    """An epsilon as a journal has it: null without a bound."""
    return epsilon if math.isfinite(epsilon) else None


def _skipped(rows: int) -> dict[str, object]:
    """The journal's entry for rows left out because their privacy budgets are spent."""
    return {"skipped": rows} if rows else {}
