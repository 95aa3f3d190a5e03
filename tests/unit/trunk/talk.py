"""Silos that send the steps of sessions, and a trunk whose passes are counted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting
from isthmus.storage.record import RunDirectory
from isthmus.trunk.packed_attention import SequenceCache
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.oracle.twins import distance

WIDTH = 32
WAIT = 60.0
SOON = 0.4
TOLERANCE = 1e-5
BYTES = 3 * 2 * 2 * 8 * 4
"""Of one position: 3 blocks, keys and values, 2 heads of 8 values of 4 bytes."""
Frame = dict[str, Any]
Story = list[Frame]
"""The steps of one session: lengths, and what to forget or which rows to keep first."""


def prompt(*lengths: int) -> Frame:
    return {"lengths": lengths}


def tokens(*lengths: int, forget: int = 0, rows: tuple[int, ...] = ()) -> Frame:
    return {"lengths": lengths, "forget": forget, "rows": rows}


ONE = tokens(1)


def hidden(seed: int, number: int, frame: Frame) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1000 * seed + number)
    return torch.randn(sum(frame["lengths"]), WIDTH, generator=draw)


def decoded(answer: Answer) -> torch.Tensor:
    body: Any = answer.result(WAIT)
    return codec.decode(body.hidden, rows=body.hidden.rows, width=WIDTH, codec="fp32")


class Trunk:
    """A service whose passes are counted, and whose compute thread can be held."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe = recipe
        self.service = TrunkService(recipe, RunDirectory(directory).role("trunk"))
        self.passes: list[list[int]] = []
        """Lengths of the pieces of each pass."""
        self.answered: dict[Answer, int] = {}
        """Of each step that was answered, how many passes there had been by then."""
        self.most_bytes = 0
        self._continued = self.service._runner.cached_pass
        self.service._runner.cached_pass = self._counted  # type: ignore[method-assign]

    def _counted(
        self, h_TD: torch.Tensor, lengths: list[int], caches: list[SequenceCache], ends: list[int | None]
    ) -> torch.Tensor:
        result = self._continued(h_TD, lengths, caches, ends)
        self.passes.append(list(lengths))
        self.most_bytes = max(self.most_bytes, self.service._sessions.nbytes)
        return result

    def noted(self, answer: Answer) -> Answer:
        """The same answer, once it is noted."""
        result = Answer()

        def note(done: Answer) -> None:
            self.answered[result] = len(self.passes)
            if (error := done.exception()) is not None:
                result.set_exception(error)
            else:
                result.set_result(done.result())

        answer.add_done_callback(note)
        return result

    def silo(self, name: str) -> Silo:
        return Silo(self, name)

    def held(self) -> Held:
        return Held(self.service)


class Held:
    """Holds the compute thread while requests come in."""

    def __init__(self, service: TrunkService) -> None:
        self._go = threading.Event()
        service._scheduler.submit(lambda: self._go.wait(WAIT))

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self._go.set()


class Silo:
    """A silo that sends sessions' steps."""

    def __init__(self, trunk: Trunk, name: str) -> None:
        hello = greeting(Checkpoint(trunk.recipe.model.path), trunk.recipe)
        self.channel = LoopbackChannel(trunk.service, name, greeting=hello)
        self._noted = trunk.noted

    def send(self, session: int, number: int, frame: Frame, h_TD: torch.Tensor | None = None) -> Answer:
        h_TD = hidden(session, number, frame) if h_TD is None else h_TD
        request = pb.Decode(session=session, step=number, hidden=codec.encode(h_TD, "fp32"), **frame)
        return self._noted(self.channel.submit(request))

    def tell(self, session: int, story: Story) -> list[Answer]:
        """All steps of a session at once: the trunk keeps their order."""
        return [self.send(session, number, frame) for number, frame in enumerate(story)]

    def close(self, session: int) -> None:
        self.channel.call(pb.Close(session=session))


Build = Callable[..., Trunk]


def alone(trunk: Trunk, number: int, story: Story) -> list[torch.Tensor]:
    """What the story gives when nobody else is there."""
    silo = trunk.silo("d")
    answers = [decoded(silo.send(number, step, frame)) for step, frame in enumerate(story)]
    silo.close(number)
    return answers


def assert_equal(answers: list[Answer], expected: list[torch.Tensor], tolerance: float = TOLERANCE) -> None:
    for answer, one in zip(answers, expected, strict=True):
        assert distance(decoded(answer), one) <= tolerance
