"""Four silos that train with a trunk in step, each frame sent when it is told to.

Shapes: T tokens of all sequences of a frame, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from isthmus.model import adapters
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.conftest import make_recipe
from tests.oracle.twins import Tensors, loopback, random_b
from tests.unit.trunk.talk import WAIT, WIDTH, Held

NAMES = ("a", "b", "c", "d")
LONG = 30.0
"""Seconds that nothing takes, unless someone waits for a frame that does not come."""
Work = tuple[int, tuple[int, ...]]
"""Seed and sequence lengths of one forward and backward."""


def tensors_of(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and the gradient of what the trunk makes of them."""
    seed, lengths = work
    h_TD, gradient_TD = torch.randn(2, sum(lengths), WIDTH, generator=torch.Generator().manual_seed(seed))
    return h_TD, gradient_TD


class Drill:
    """A service with silos in a round; its adapter starts from random values."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.directory = RunDirectory(folder).role("trunk")
        fresh = not self.directory.rounds()
        self.service = TrunkService(recipe, self.directory)
        self.part = self.service._runner.part
        self.passes: list[list[int]] = []
        """Lengths of the sequences of each pass."""
        whole = self.service._runner.full_pass
        self.service._runner.full_pass = lambda h_TD, lengths, *more: (  # type: ignore[method-assign]
            self.passes.append(list(lengths)),
            whole(h_TD, lengths, *more),
        )[1]
        if fresh:
            adapters.load_adapter(self.part, random_b(adapters.adapter_of(self.part)))
            self.service._training.save(0)
        self.silos = {silo.name: Silo(loopback(self.service, silo.name, recipe), silo.name) for silo in recipe.silo}

    def begin(self, number: int = 1, names: Iterable[str] = NAMES) -> None:
        results([self.silos[name].begin(number, names) for name in names])

    def held(self) -> Held:
        return Held(self.service)

    def adapter(self) -> Tensors:
        return adapters.adapter_of(self.part)

    def gradients(self, name: str) -> list[torch.Tensor]:
        """The sum of this silo's gradients since the last step."""
        found = self.service._training._silos[name].gradients
        assert found is not None
        return found


class Silo:
    def __init__(self, channel: Any, name: str) -> None:
        self.channel: LoopbackChannel = channel
        self.name = name
        self.last = 0

    def begin(self, number: int, names: Iterable[str]) -> Answer:
        return self.channel.submit(pb.Begin(round=number, participants=names))

    def forward(self, work: Work, *, train: bool = True) -> Answer:
        self.last += 1
        hidden = codec.encode(tensors_of(work)[0], "fp32")
        return self.channel.submit(pb.Forward(step=self.last, lengths=work[1], hidden=hidden, train=train))

    def backward(self, step: int, work: Work, *, reply: bool = True, times: float = 1.0) -> Answer:
        gradient = codec.encode(times * tensors_of(work)[1], "fp32")
        return self.channel.submit(pb.Backward(step=step, gradient=gradient, reply=reply))

    def commit(self, step: int, weight: float, round: int = 1) -> Answer:
        return self.channel.submit(pb.Commit(round=round, step=step, weight=weight))

    def work(self, *all_work: Work) -> None:
        """Forward and backward of each, one after another."""
        for work in all_work:
            self.forward(work).result(WAIT)
            self.backward(self.last, work).result(WAIT)


def recipe_of(model: Path, *, silos: tuple[str, ...] = NAMES, train: dict[str, Any], **trunk: Any) -> Recipe:
    train = {"optimizer": "sgd", "learning_rate": 1e-4, "evaluate": False, **train}
    return make_recipe(model, silos=silos, train=train, trunk={"patience": LONG, "gather": LONG, **trunk})


def results(answers: Iterable[Answer]) -> list[Any]:
    return [answer.result(WAIT) for answer in list(answers)]  # all are sent before the first is waited for


def decoded(answer: Answer) -> torch.Tensor | None:
    """The tensor that came; None for a gradient that was not asked for."""
    body: Any = answer.result(WAIT)
    matrix = body.hidden if isinstance(body, pb.Hidden) else body.gradient
    return codec.decode(matrix, rows=matrix.rows, width=WIDTH, codec="fp32") if matrix.rows else None


Drills = Callable[..., Drill]
