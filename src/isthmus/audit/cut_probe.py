"""What one cut costs and leaks: a silo with the recipe's model and rows, measured in this process.

Nothing leaves the process, and no ledger is written: the silo's frames go to a stand-in or to a trunk beside it.
"""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from google.protobuf.message import Message
from transformers.utils import logging as transformers_logging

from isthmus.audit.capture import restored_trunk
from isthmus.audit.target import Target
from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Batch, Tokens, collate
from isthmus.engines.cuts import CutFigures
from isthmus.engines.dry_run import without_budgets
from isthmus.engines.memory import free_memory, peak_memory
from isthmus.engines.threads import set_threads
from isthmus.engines.zero_trunk import ZeroTrunk
from isthmus.errors import AttackError, DataError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, empty_part
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, connect_silo, greeting, load_data
from isthmus.silo.local_steps import LocalSteps
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import Step, train_step
from isthmus.silo.update import update_sizes
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, Service

STEPS = 3
"""Training steps of which the fastest counts."""
TOKENS = 12
"""Decoded tokens, of which the median counts without the first."""
PROMPT_TOKENS = 32
"""Most tokens of the prompt before them."""
ATTACKED_ROWS = 24
"""Rows that are attacked, unless the silo has fewer than twice as many."""
KNOWN_ROWS = 256
"""Most rows that the attacker knows."""
ROOM = 1.3
"""Memory that a trunk is taken to need, in sizes of its weights."""


class TimedService:
    """A service, and how long it took over each request. Implements ``wire.channel.Service``."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.spans: list[tuple[type[Message], float, float]] = []
        """Kind of each request, and when it came and was answered (``seconds_here``)."""

    def handle(self, peer: str, request: Message) -> Answer:
        started, kind = seconds_here(), type(request)
        answer = self._service.handle(peer, request)
        answer.add_done_callback(lambda _: self.spans.append((kind, started, seconds_here())))
        return answer

    @property
    def seconds(self) -> float:
        """Time over all requests together."""
        return sum(end - start for _, start, end in self.spans)


def seconds_here() -> float:
    """A clock for what this process computes. With one thread on a processor its own time counts alone, so that the
    machine's other work does not."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return time.process_time() if alone else time.perf_counter()


def probe_cut(recipe: Recipe, name: str, rows: int | None, attacks: Sequence[str], trunk: bool) -> Iterator[CutFigures]:
    """What the recipe's cut costs the silo and leaks. Yields the figures so far, each time with more of them.

    Memory is this process's: it has to be a fresh one. It is read before the trunk is loaded and the attack made.

    Args:
        name: the silo.
        rows: rows that are attacked; the others are known to the attacker. 0: no attack. None: ``ATTACKED_ROWS``, or
            half of them.
        attacks: names from ``attacks.catalogue.INVERSIONS``.
        trunk: measure the trunk's part, too, if the machine has the memory for it.

    Raises:
        DataError: the silo has no rows.
        AttackError: it has too few rows.
    """
    set_threads(recipe)
    transformers_logging.disable_progress_bar()
    recipe = without_budgets(recipe)
    cut = Cut(recipe.model.bottom, recipe.model.top)
    figures = CutFigures(cut.bottom, cut.top)
    with probed_silo(recipe, name, TimedService(ZeroTrunk(recipe))) as (silo, service, channel):
        data = load_data(recipe, name, silo)
        if not data.train:
            raise DataError(f"{name} has no training rows", remedy="name its rows in silo.train")
        own = AttackRows.drawn(recipe, name, data, rows)
        figures = _silo_figures(figures, recipe, silo, data, service, channel)
        yield figures
    if trunk and _trunk_bytes(recipe, cut) < free_memory():
        with restored_trunk(Target(recipe)) as real:
            figures = _trunk_figures(figures, recipe, name, data, TimedService(real))
        yield figures
    if own.attacked:
        from isthmus.audit.cut_leakage import measured_leakage  # what attacks import is not in the silo's memory

        yield measured_leakage(figures, recipe, name, own, attacks)


@dataclass(frozen=True)
class AttackRows:
    """Rows of the silo to attack, and others that the attacker knows; none is in both."""

    attacked: list[Tokens]
    known: list[Tokens]

    @classmethod
    def drawn(cls, recipe: Recipe, name: str, data: SiloData, rows: int | None) -> AttackRows:
        """Rows drawn by the recipe's seed.

        Args:
            rows: as in ``probe_cut``.

        Raises:
            AttackError: there are too few to attack as many as asked for and know as many others.
        """
        different = list({tuple(row.input): row for row in data.train}.values())
        if rows == 0:
            return cls([], [])
        count = min(ATTACKED_ROWS, len(different) // 2) if rows is None else rows
        if not count or len(different) < 2 * count:
            raise AttackError(
                f"{name} has {len(different)} different training rows, too few to attack {count or 1} "
                "and learn from as many others",
                remedy=f"use --rows {len(different) // 2} or less; --rows 0 makes no attack",
            )
        mixed = random.Random(f"{recipe.seed}/{name}/cut").sample(different, len(different))
        return cls(mixed[:count], mixed[count : count + KNOWN_ROWS])


@contextmanager
def probed_silo(
    recipe: Recipe, name: str, service: TimedService
) -> Iterator[tuple[Silo, TimedService, LoopbackChannel]]:
    """The silo with initial adapters, connected to this service in this process; yields both and the channel."""
    hello = greeting(Checkpoint(recipe.model.path), recipe)
    channel = LoopbackChannel(service, name, greeting=hello, limit=recipe.wire.max_frame_bytes)
    with tempfile.TemporaryDirectory() as temporary:
        silo = connect_silo(recipe.of_silo(name), name, channel=channel, releases=Path(temporary) / "released")
        silo.rounds.by_hand = True  # no round is begun, none committed
        with silo:
            yield silo, service, channel


def _silo_figures(
    figures: CutFigures, recipe: Recipe, silo: Silo, data: SiloData, service: TimedService, channel: LoopbackChannel
) -> CutFigures:
    """Memory, times and bytes of the silo's own part."""
    device = silo.model.device
    longest = sorted(data.train, key=lambda row: len(row.input))[-recipe.train.batch :]
    parameters = {key: one for part in silo.parts for key, one in adapters.trainable(part).items()}
    local = LocalSteps(parameters, recipe.train)
    optimizer = local.optimizer()

    def step(batch: Batch) -> float:
        def take(optimizer: torch.optim.Optimizer) -> Step:
            if recipe.train.micro_batches == 1:
                return train_step(silo.model, optimizer, batch)
            return pipelined_step(silo.model, optimizer, batch, recipe.train.micro_batches)

        service.spans.clear()
        local.begin()
        started = seconds_here()
        local.take(take, optimizer, silo.trunk)
        return seconds_here() - started - service.seconds

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step(collate(longest, data.pad).to(device))
    memory = peak_memory() if device.type != "cuda" else torch.cuda.max_memory_reserved(device)
    batch = _timed_batch(data).to(device)
    before = channel.sent_bytes, channel.received_bytes
    seconds = min(step(batch) for _ in range(STEPS))
    up, down = channel.sent_bytes - before[0], channel.received_bytes - before[1]
    token, size = _token_seconds(silo, data, service, channel)
    return replace(
        figures,
        memory=memory,
        silo_step=seconds,
        up=up // STEPS,
        down=down // STEPS,
        silo_token=token,
        token_bytes=size,
        update_bytes=sum(update_sizes(recipe, parameters)),
    )


def _trunk_figures(figures: CutFigures, recipe: Recipe, name: str, data: SiloData, service: TimedService) -> CutFigures:
    """Times of the trunk's part, and the bytes of its real answers."""
    with probed_silo(recipe, name, service) as (silo, _, channel):
        batch, spent = _timed_batch(data).to(silo.model.device), []
        for _ in range(STEPS):
            service.spans.clear()
            before = channel.received_bytes
            silo.model.zero_grad()
            silo.model(**batch.inputs()).loss.backward()
            spent.append(service.seconds)
            down = channel.received_bytes - before
        silo.model.zero_grad()
        _token_seconds(silo, data, service, channel)
        tokens = [end - start for kind, start, end in service.spans if kind is pb.Decode][1:]
    return replace(figures, trunk_step=min(spent), down=down, trunk_token=statistics.median(tokens))


@torch.no_grad()
def _token_seconds(silo: Silo, data: SiloData, service: TimedService, channel: LoopbackChannel) -> tuple[float, int]:
    """Seconds of a decoded token without the service's part, and bytes of one, both ways."""
    ids_BL = torch.tensor([data.train[0].prompt[-PROMPT_TOKENS:] or data.train[0].input[:1]], device=silo.model.device)
    service.spans.clear()
    training = silo.model.training
    silo.model.eval().generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=data.pad,
    )
    silo.model.train(training)
    decoded = [(start, end) for kind, start, end in service.spans if kind is pb.Decode]
    between = [after[0] - before[1] for before, after in itertools.pairwise(decoded)]
    return statistics.median(between), _token_bytes(silo, channel)


@torch.no_grad()
def _token_bytes(silo: Silo, channel: LoopbackChannel) -> int:
    """Bytes of one position, both ways."""
    before = channel.sent_bytes + channel.received_bytes
    silo.model(input_ids=torch.ones(1, 1, dtype=torch.long, device=silo.model.device), use_cache=False)
    return channel.sent_bytes + channel.received_bytes - before


def _timed_batch(data: SiloData) -> Batch:
    """The first batch of the first round, the same for each cut."""
    return collate(data.round_batches(1)[0], data.pad)


def _trunk_bytes(recipe: Recipe, cut: Cut) -> float:
    """Memory that a trunk of this cut is taken to need."""
    part = empty_part(Checkpoint(recipe.model.path).config, cut, "trunk")
    dtype = getattr(torch, recipe.trunk.dtype or recipe.model.dtype)
    return float(ROOM * dtype.itemsize * sum(one.numel() for one in part.model.parameters()))
