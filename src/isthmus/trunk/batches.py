"""The scheduler's job kinds for training frames: forward, backward and evaluation passes batched over silos.

A job's request is ``(silo, message)``; its answer is a message.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from isthmus.recipe import TrunkSection
from isthmus.trunk.codecs import Codecs
from isthmus.trunk.runner import Runner
from isthmus.trunk.scheduler import Job
from isthmus.trunk.training import BackwardStep, ForwardStep, TrunkTraining
from isthmus.wire import isthmus_pb2 as pb

T = TypeVar("T")


class Forwards:
    """Forward passes of training steps. A frame waits up to ``trunk.gather`` seconds for those of the round's other
    silos."""

    def __init__(self, training: TrunkTraining, codecs: Codecs, section: TrunkSection) -> None:
        self._training = training
        self._codecs = codecs
        self._section = section

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        return _gathered(jobs, self._training.expected, self._section, now)

    def run(self, jobs: list[Job]) -> None:
        read = _read(jobs, self._forward)
        if read:
            outputs = self._training.forward([forward for _, forward in read])
            for (job, _), output_TD in zip(read, outputs, strict=True):
                job.settle(partial(self._codecs.encode_hidden, output_TD))

    def _forward(self, silo: str, request: pb.Forward) -> ForwardStep:
        lengths = list(request.lengths)
        self._training.check_forward(silo, request.step, lengths)
        h_TD = self._codecs.decode_forward(silo, request)
        masks = self._training.next_masks(silo) if request.dropout else None
        return ForwardStep(silo, request.step, h_TD, lengths, masks)


class Backwards:
    """Backward passes of training steps. Those whose forwards were computed together wait for one another, up to
    ``trunk.gather`` seconds."""

    def __init__(self, training: TrunkTraining, codecs: Codecs, section: TrunkSection) -> None:
        self._training = training
        self._codecs = codecs
        self._section = section

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        return _gathered(jobs, self._partners(jobs[0]), self._section, now)

    def run(self, jobs: list[Job]) -> None:
        read = _read(jobs, self._backward)
        if read:
            for (job, _), result in zip(read, self._training.backward([one for _, one in read]), strict=True):
                if isinstance(result, Exception):
                    job.done.set_exception(result)
                else:
                    job.settle(partial(self._codecs.encode_gradient, *result))

    def _backward(self, silo: str, request: pb.Backward) -> BackwardStep:
        rows = self._training.open_step(silo, request.step).rows
        gradient_TD = self._codecs.decode_gradient(request.gradient, rows)
        keep = request.keep if request.HasField("keep") else 1.0
        return BackwardStep(silo, request.step, gradient_TD, request.reply, request.ascent_pass, keep)

    def _partners(self, job: Job) -> int:
        silo, request = job.request
        return self._training.partners(silo, request.step)


class Evaluations:
    """Forward passes without a graph, through the adapter that inference uses. All waiting ones are computed
    together."""

    def __init__(self, runner: Runner, codecs: Codecs, section: TrunkSection) -> None:
        self._runner = runner
        self._codecs = codecs
        self._section = section

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        return jobs[: self._section.together], 0.0

    @torch.no_grad()
    def run(self, jobs: list[Job]) -> None:
        read = _read(jobs, self._rows)
        if read:
            lengths = [length for _, (_, own) in read for length in own]
            h_TD = self._runner.full_pass(torch.cat([h_TD for _, (h_TD, _) in read]), lengths)
            outputs = torch.split(h_TD, [sum(own) for _, (_, own) in read])
            for (job, _), output_TD in zip(read, outputs, strict=True):
                job.settle(partial(self._codecs.encode_hidden, output_TD))

    def _rows(self, silo: str, request: pb.Forward) -> tuple[torch.Tensor, list[int]]:
        lengths = list(request.lengths)
        self._runner.check_context(lengths)
        return self._codecs.decode_forward(silo, request), lengths


def _gathered(jobs: list[Job], expected: int, section: TrunkSection, now: float) -> tuple[list[Job], float]:
    """The jobs to run now, at most ``trunk.together``: once all expected ones have come, or the first has waited
    ``trunk.gather`` seconds. Otherwise none, and the seconds left to wait."""
    left = min(job.since for job in jobs) + section.gather - now
    if len(jobs) >= min(expected, section.together) or left <= 0:
        return jobs[: section.together], 0.0
    return [], left


def _read(jobs: list[Job], read: Callable[[str, Any], T]) -> list[tuple[Job, T]]:
    """The jobs whose requests ``read`` accepts, each with its result. Other jobs get the error as their answer."""
    found = []
    for job in jobs:
        try:
            found.append((job, read(*job.request)))
        except Exception as error:
            job.done.set_exception(error)
    return found
