"""Steps of a silo as training has them that train nothing: random tokens, and of the trunk's work forwards alone."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from google.protobuf.message import Message
from transformers.utils import logging as transformers_logging

from isthmus.data.tokens import Batch, Tokens, collate
from isthmus.engines.memory import peak_memory
from isthmus.engines.reachability import open_channel, servers_of
from isthmus.engines.threads import set_threads
from isthmus.engines.zero_trunk import ZeroTrunk
from isthmus.errors import ProtocolError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, connect_silo, greeting
from isthmus.silo.local_steps import LocalSteps
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import Step, train_step
from isthmus.silo.update import update_sizes
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel, LoopbackChannel

DRY_STEPS = 10
BACKWARDS = 2
"""A backward of the trunk takes about so many times as long as its forward."""
ANSWER_TOKENS = 4
"""Tokens with a loss in each row."""
TRAINS = "the federation trains now, and is left alone"


@dataclass(frozen=True)
class DryRun:
    """What some steps took."""

    steps: int
    seconds: float
    """Median of a step: the silo's own work, and the trunk's forward if it was asked."""
    waited: float | None
    """Of these the time for the trunk's forward; None: the trunk was not asked."""
    alone: str
    """Why the trunk was not asked, or not to the end; empty: it was."""
    up: int
    """Bytes to the trunk in a training step."""
    down: int
    """Bytes from the trunk in a training step."""
    frame: int
    """Bytes of the largest frame, with rows as long as the recipe allows."""
    update: int
    """Bytes of an update to the aggregator, and of the mean that comes back."""
    memory: int
    """Most bytes in memory at once with such rows; on a CUDA device of the device's memory."""

    @property
    def step_seconds(self) -> float:
        """About what a training step takes, with the trunk's backward, without waiting for other silos."""
        return self.seconds + BACKWARDS * (self.waited or 0.0)


class DryChannel:
    """A channel that lets forwards without a backward through, and nothing else. Implements ``wire.channel.Channel``.

    What a training step asks for beside them is answered here, with zeros.

    Args:
        zeros: a channel to a ``ZeroTrunk``.
        trunk: a channel to the trunk; None: all is answered here.
    """

    def __init__(self, zeros: LoopbackChannel, trunk: Channel | None = None) -> None:
        self._zeros, self.trunk = zeros, trunk
        self.sent_bytes = self.received_bytes = 0
        """Of a training step, also of what stays here."""
        self.largest = 0
        """Bytes of the largest frame."""
        self._asked: list[tuple[float, float]] = []

    @property
    def welcome(self) -> pb.Welcome:
        """None was asked for."""
        return pb.Welcome()

    def submit(self, request: Message) -> Answer:
        answer, trunk = self._zeros.submit(request), self.trunk
        self.sent_bytes, self.received_bytes = self._zeros.sent_bytes, self._zeros.received_bytes
        self.largest = max(self.largest, request.ByteSize())
        if trunk is None or not isinstance(request, pb.Forward):
            return answer
        if request.examples:
            raise ProtocolError("a dry run keeps no examples", remedy="turn boundary.release_once off for it")
        asked = pb.Forward(step=request.step, lengths=request.lengths, hidden=request.hidden)
        started, answer = time.perf_counter(), trunk.submit(asked)
        answer.add_done_callback(lambda _: self._asked.append((started, time.perf_counter())))
        return answer

    def call(self, request: Message) -> Any:
        return self.submit(request).result()

    def close(self) -> None:
        if self.trunk is not None:
            self.trunk.close()

    def pop_waited(self) -> float:
        """Seconds in which the trunk had something to answer since the last call; what overlaps counts once."""
        total, until = 0.0, 0.0
        for begin, end in sorted(self._asked):
            total += max(0.0, end - max(begin, until))
            until = max(until, end)
        self._asked.clear()
        return total


def dry_run(recipe: Recipe, name: str, length: int, alone: str = "") -> Iterator[DryRun]:
    """Steps of this silo that train nothing: what was measured so far, each time of more. For a fresh process.

    The tokens are random, nothing of the silo's rows. The trunk is asked for forwards without a backward, with the
    recipe's clip, noise and codec; its adapter, rounds and kept examples, and what a running process of the silo has
    there, stay as they are. The silo's adapters, their optimizer and the ledger exist in this process alone.

    Args:
        length: tokens of a row.
        alone: why the trunk is not to be asked; empty: it is.

    Raises:
        IsthmusError: the model, the device or the trunk cannot be used.
    """
    set_threads(recipe)
    transformers_logging.disable_progress_bar()
    trying = without_budgets(recipe)
    trying = trying.model_copy(update={"boundary": trying.boundary.model_copy(update={"release_once": False})})
    zeros = LoopbackChannel(ZeroTrunk(trying), name, limit=2**31 - 1)
    channel = DryChannel(zeros)
    silo = connect_silo(trying, name, channel=channel)
    silo.rounds.by_hand = True  # no round is begun, none committed
    silo.model.train()
    with silo:
        stepper = DrySteps(silo, trying, channel)
        longest = min(recipe.train.max_tokens, context_of(recipe))
        stepper.take(longest)  # the largest comes first: memory is the process's peak
        found = replace(stepper.figures(alone), memory=_peak(silo), frame=channel.largest)
        yield found
        stepper.clear()
        if not alone:
            channel.trunk = _trunk_channel(recipe, name)
        for _ in range(DRY_STEPS):
            if channel.trunk is not None and _trains(channel.trunk, recipe, name):
                channel.close()
                alone, channel.trunk = TRAINS, None
                stepper.clear()
            stepper.take(min(length, longest))
        yield replace(stepper.figures(alone), memory=found.memory, frame=found.frame)


class DrySteps:
    """Steps of a silo on random tokens, and how long they took."""

    def __init__(self, silo: Silo, recipe: Recipe, channel: DryChannel) -> None:
        self._silo, self._recipe, self._channel = silo, recipe, channel
        self._parameters = {key: one for part in silo.parts for key, one in adapters.trainable(part).items()}
        self._local = LocalSteps(self._parameters, recipe.train)
        self._optimizer = self._local.optimizer()
        self._taken: list[tuple[float, float, int, int]] = []
        """Of each step: its seconds, those of the trunk, bytes up and down."""

    def take(self, length: int) -> None:
        """Take a step on rows of this many tokens."""
        batch = random_batch(self._recipe, self._silo, length).to(self._silo.model.device)
        before = self._channel.sent_bytes, self._channel.received_bytes
        self._local.begin()
        self._channel.pop_waited()
        started = time.perf_counter()
        self._local.take(self._one(batch), self._optimizer, self._silo.trunk)
        seconds = time.perf_counter() - started
        up, down = self._channel.sent_bytes - before[0], self._channel.received_bytes - before[1]
        self._taken.append((seconds, self._channel.pop_waited(), up, down))

    def clear(self) -> None:
        """Forget the steps so far."""
        self._taken.clear()

    def figures(self, alone: str) -> DryRun:
        """What the steps took; memory and the largest frame are left out."""
        seconds, waited, up, down = (statistics.median(column) for column in zip(*self._taken, strict=True))
        update = sum(update_sizes(self._recipe, self._parameters))
        return DryRun(
            len(self._taken), seconds, None if alone else waited, alone, int(up), int(down), 0, update, memory=0
        )

    def _one(self, batch: Batch) -> Callable[[torch.optim.Optimizer], Step]:
        pieces, model = self._recipe.train.micro_batches, self._silo.model
        if pieces == 1:
            return lambda optimizer: train_step(model, optimizer, batch)
        return lambda optimizer: pipelined_step(model, optimizer, batch, pieces)


def random_batch(recipe: Recipe, silo: Silo, length: int) -> Batch:
    """A batch as large as the recipe's, of random tokens.

    Args:
        length: tokens of each row.
    """
    draw, size = random.SystemRandom(), silo.model.config.vocab_size
    answer = min(ANSWER_TOKENS, length)
    rows = [draw.choices(range(size), k=length + 1) for _ in range(recipe.train.batch)]
    return collate([Tokens(row[:-answer], row[-answer:]) for row in rows], silo.tokenizer.pad_token_id or 0)


def without_budgets(recipe: Recipe) -> Recipe:
    """The recipe without privacy budgets, for releases that nobody would have to allow; and with a round to train in,
    where it is for inference only."""
    privacy = recipe.privacy.model_copy(update={"record_epsilon": None, "silo_epsilon": None})
    train = recipe.train.model_copy(update={"rounds": max(1, recipe.train.rounds)})
    sensitivity = recipe.sensitivity
    if sensitivity is not None:
        classes = {key: one.model_copy(update={"epsilon": None}) for key, one in sensitivity.classes.items()}
        sensitivity = sensitivity.model_copy(update={"classes": classes})
    return recipe.model_copy(update={"privacy": privacy, "train": train, "sensitivity": sensitivity})


def context_of(recipe: Recipe) -> int:
    """Most tokens of a row that the model reads; very many if its configuration says nothing."""
    return int(getattr(Checkpoint(recipe.model.path).config.get_text_config(), "max_position_embeddings", 2**20))


def _trunk_channel(recipe: Recipe, name: str) -> Channel:
    return open_channel(recipe, servers_of(recipe, name, "silo")[0], name, "silo")


def _trains(trunk: Channel, recipe: Recipe, name: str) -> bool:
    """Whether the trunk is within a round. It compares the recipe again, and so knows this silo after a restart."""
    own = recipe.of_silo(name, ranked=False)
    answer: pb.Pong = trunk.call(pb.Ping(compared=greeting(Checkpoint(own.model.path), own)))
    return answer.welcome.training


def _peak(silo: Silo) -> int:
    if silo.model.device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(silo.model.device))
    return peak_memory()
