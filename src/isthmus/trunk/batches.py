"""Training frames of many silos computed together: the scheduler's kinds of job for forward, backward, evaluation.

Requests are ``(silo, message)``; answers are messages.
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
from isthmus.trunk.training import Backward, Forward, Training
from isthmus.wire import isthmus_pb2 as pb

T = TypeVar("T")


class Forwards:
    """Forwards of training steps. One silo's frame waits ``gather`` seconds for those of the others in the round."""

    def __init__(self, training: Training, codecs: Codecs, section: TrunkSection) -> None:
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
                job.settle(partial(self._codecs.hidden_out, output_TD))

    def _forward(self, silo: str, request: pb.Forward) -> Forward:
        lengths = list(request.lengths)
        self._training.check_forward(silo, request.step, lengths)
        return Forward(silo, request.step, self._codecs.forward_in(silo, request), lengths)


class Backwards:
    """Backwards of training steps. Those whose forwards were computed together wait for one another."""

    def __init__(self, training: Training, codecs: Codecs, section: TrunkSection) -> None:
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
                    job.settle(partial(self._codecs.gradient_out, result))

    def _backward(self, silo: str, request: pb.Backward) -> Backward:
        rows = self._training.open_step(silo, request.step).rows
        gradient_TD = self._codecs.gradient_in(request.gradient, rows)
        return Backward(silo, request.step, gradient_TD, request.reply, request.ascent_pass)

    def _partners(self, job: Job) -> int:
        silo, request = job.request
        return self._training.partners(silo, request.step)


class Evaluations:
    """Forwards without a graph, through the adapter that inference uses; whatever waits is computed together."""

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
            h_TD = self._runner.whole(torch.cat([h_TD for _, (h_TD, _) in read]), lengths)
            outputs = torch.split(h_TD, [sum(own) for _, (_, own) in read])
            for (job, _), output_TD in zip(read, outputs, strict=True):
                job.settle(partial(self._codecs.hidden_out, output_TD))

    def _rows(self, silo: str, request: pb.Forward) -> tuple[torch.Tensor, list[int]]:
        lengths = list(request.lengths)
        self._runner.check_context(lengths)
        return self._codecs.forward_in(silo, request), lengths


def _gathered(jobs: list[Job], expected: int, section: TrunkSection, now: float) -> tuple[list[Job], float]:
    """As many as may be computed together, once so many are there as are expected or the first has waited enough."""
    left = min(job.since for job in jobs) + section.gather - now
    if len(jobs) >= min(expected, section.together) or left <= 0:
        return jobs[: section.together], 0.0
    return [], left


def _read(jobs: list[Job], read: Callable[[str, Any], T]) -> list[tuple[Job, T]]:
    """The jobs with what was read of them; a job that cannot be read gets its error, and the others go on."""
    found = []
    for job in jobs:
        try:
            found.append((job, read(*job.request)))
        except Exception as error:
            job.done.set_exception(error)
    return found
