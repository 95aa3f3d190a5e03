"""The scheduler's job kinds for training frames: forward, backward and evaluation passes batched over silos.

A job's request is ``(silo, message)``, or an ``Evaluation``; its answer is a message. If a pass fails, each of its jobs
is computed by itself, so that the one that is to blame is refused alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from google.protobuf.message import Message

from isthmus.recipe import TrunkSection
from isthmus.trunk.codecs import Codecs
from isthmus.trunk.runner import Runner
from isthmus.trunk.scheduler import Job, fair_shares
from isthmus.trunk.stash import Pass
from isthmus.trunk.training import BackwardStep, ForwardStep, TrunkTraining
from isthmus.wire import isthmus_pb2 as pb

SPARE_STEPS = 8
"""Steps beyond its micro-batches that a silo's own loop may have open, and still share passes."""
T = TypeVar("T")
R = TypeVar("R")


class Forwards:
    """Forward passes of training steps. A frame waits up to ``trunk.gather`` seconds for those of the round's other
    silos; one of a silo with many more steps open than it has micro-batches is computed by itself.

    Args:
        pieces: micro-batches of a step.
    """

    rests = True

    def __init__(self, training: TrunkTraining, codecs: Codecs, section: TrunkSection, pieces: int = 1) -> None:
        self._training = training
        self._codecs = codecs
        self._section = section
        self._pieces = pieces

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        if self._hoards(jobs[0]):
            return jobs[:1], 0.0
        return _gathered([job for job in jobs if not self._hoards(job)], self._training.expected, self._section, now)

    def _hoards(self, job: Job) -> bool:
        """Whether the silo has so many steps open that it may never send their backwards: nobody shares a pass, and
        its graph, with them."""
        silo, _ = job.request
        return self._training.opened(silo) > self._pieces + SPARE_STEPS

    def run(self, jobs: list[Job]) -> None:
        read = _read(jobs, self._forward)
        for job, output_TD in _computed(read, self._training.forward):
            silo, request = job.request
            job.settle(partial(self._codecs.encode_answer, silo, request, output_TD))

    def _forward(self, silo: str, request: pb.Forward) -> ForwardStep:
        lengths = list(request.lengths)
        self._training.check_forward(silo, request.step, lengths)
        h_TD = self._codecs.decode_forward(silo, request)
        masks = self._training.next_masks(silo) if request.dropout else None
        return ForwardStep(silo, request.step, h_TD, lengths, masks)


class Backwards:
    """Backward passes of training steps. Those whose forwards were computed together wait for one another, up to
    ``trunk.gather`` seconds."""

    rests = True

    def __init__(self, training: TrunkTraining, codecs: Codecs, section: TrunkSection) -> None:
        self._training = training
        self._codecs = codecs
        self._section = section

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        pause = self._section.gather
        for job in jobs:
            chosen, left = self._partners(job, jobs, now)
            if chosen:
                return chosen, 0.0
            pause = min(pause, left)
        return [], pause

    def _partners(self, job: Job, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        """The backwards of one forward pass to run now; a step that is not open runs alone, to be refused."""
        computed = self._pass_of(job)
        if computed is None:
            return [job], 0.0
        silo, request = job.request
        partners = [other for other in jobs if self._pass_of(other) is computed]
        return _gathered(partners, self._training.partners(silo, request.step), self._section, now)

    def _pass_of(self, job: Job) -> Pass | None:
        silo, request = job.request
        return self._training.pass_of(silo, request.step)

    def run(self, jobs: list[Job]) -> None:
        read = _read(jobs, self._backward)
        for job, result in _computed(read, self._training.backward):
            if isinstance(result, Exception):
                job.done.set_exception(result)
            else:
                job.settle(partial(self._codecs.encode_gradient, *result))

    def _backward(self, silo: str, request: pb.Backward) -> BackwardStep:
        rows = self._training.open_step(silo, request.step).rows
        gradient_TD = self._codecs.decode_gradient(request.gradient, rows)
        keep = request.keep if request.HasField("keep") else 1.0
        return BackwardStep(silo, request.step, gradient_TD, request.reply, request.ascent_pass, keep)


@dataclass(eq=False)
class Evaluation:
    """An evaluation pass of a silo, and how far it is."""

    silo: str
    request: pb.Forward
    pending: list[torch.Tensor] | None = None
    """Hidden states of each sequence that is not computed yet, ``[tokens, D]``; None: not decoded yet."""
    results: list[torch.Tensor] = field(default_factory=list)

    def take(self, room: int) -> list[torch.Tensor]:
        """The next sequences, as many as have room, but at least one."""
        taken: list[torch.Tensor] = []
        while self.pending and (not taken or len(self.pending[0]) <= room):
            taken.append(self.pending.pop(0))
            room -= len(taken[-1])
        return taken


class Evaluations:
    """Forward passes without a graph, through the adapter that inference uses. All waiting ones are computed together;
    while requests of several silos wait, ``trunk.chunk`` tokens at a time, so that nobody waits for all of a large one.

    Args:
        crowded: whether requests of several silos wait.
    """

    rests = True

    def __init__(
        self, runner: Runner, codecs: Codecs, section: TrunkSection, crowded: Callable[[], bool] = lambda: True
    ) -> None:
        self._runner = runner
        self._codecs = codecs
        self._section = section
        self._crowded = crowded

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        return jobs[: self._section.together], 0.0

    @torch.no_grad()
    def run(self, jobs: list[Job]) -> None:
        read = _read(jobs, self._begin)
        wanted = {number: sum(map(len, one.pending or [])) for number, (_, one) in enumerate(read)}
        shares = fair_shares(wanted, self._section.chunk) if self._crowded() else wanted
        pieces = [(job, (one.silo, one.take(shares[number]))) for number, (job, one) in enumerate(read)]
        for job, outputs in _computed(pieces, self._pass):
            one: Evaluation = job.request
            one.results += outputs
            if not one.pending:
                job.settle(partial(self._encoded, one))

    def _begin(self, one: Evaluation) -> Evaluation:
        if one.pending is None:
            lengths = list(one.request.lengths)
            self._runner.check_context(lengths)
            one.pending = list(torch.split(self._codecs.decode_forward(one.silo, one.request), lengths))
        return one

    def _pass(self, pieces: list[tuple[str, list[torch.Tensor]]]) -> list[list[torch.Tensor]]:
        rows = [row for _, piece in pieces for row in piece]
        passed = [self._runner.passed(silo) for silo, piece in pieces for _ in piece]
        lengths = [len(row) for row in rows]
        outputs = iter(torch.split(self._runner.full_pass(torch.cat(rows), lengths, None, (), passed), lengths))
        return [[next(outputs) for _ in piece] for _, piece in pieces]

    def _encoded(self, one: Evaluation) -> Message:
        return self._codecs.encode_answer(one.silo, one.request, torch.cat(one.results))


def _gathered(jobs: list[Job], expected: int, section: TrunkSection, now: float) -> tuple[list[Job], float]:
    """The jobs to run now, at most ``trunk.together``: once all expected ones have come, or the first has waited
    ``trunk.gather`` seconds. Otherwise none, and the seconds left to wait."""
    left = min(job.since for job in jobs) + section.gather - now
    if len(jobs) >= min(expected, section.together) or left <= 0:
        return jobs[: section.together], 0.0
    return [], left


def _read(jobs: list[Job], read: Callable[..., T]) -> list[tuple[Job, T]]:
    """The jobs whose requests ``read`` accepts, each with its result. Other jobs get the error as their answer."""
    found = []
    for job in jobs:
        try:
            found.append((job, read(*job.request) if isinstance(job.request, tuple) else read(job.request)))
        except Exception as error:
            job.done.set_exception(error)
    return found


def _computed(read: Sequence[tuple[Job, T]], compute: Callable[[list[T]], Sequence[R]]) -> list[tuple[Job, R]]:
    """Each job's result, computed together; if that fails, each by itself. A job that fails by itself gets the error as
    its answer."""
    if not read:
        return []
    try:
        return list(zip([job for job, _ in read], compute([one for _, one in read]), strict=True))
    except Exception as error:
        if len(read) == 1:
            read[0][0].done.set_exception(error)
            return []
    return [found for one in read for found in _computed([one], compute)]
