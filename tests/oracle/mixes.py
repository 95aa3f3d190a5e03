"""Random mixes of what silos ask of a trunk at the same time, and what each sequence gives alone.

The trunk is a real service. Alone is each sequence through transformers' own blocks, by itself, whole: chunks, drafts
and whoever else shares a pass must not be seen in any answer.

Shapes: T tokens of a request, N of one sequence, D width.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.model.families import FAMILIES
from isthmus.silo.join import greeting
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.conftest import MULTIMODAL, make_recipe, targets_of
from tests.oracle.ropes import SWITCH, FirstState
from tests.oracle.twins import distance, random_b
from tests.unit.trunk.talk import Held

SILOS = ("a", "b", "c", "d")
CHUNKS = (1, 5, 16, 17, 64, 512)
TOLERANCE = 1e-5
"""Of the largest value of a sequence's answer. All compute in 64 bits, but for what a family does in 32 in any case;
the wire rounds to 32."""
TEXT_FAMILIES = tuple(name for name in FAMILIES if name not in MULTIMODAL)
"""All families, a multimodal one by its text part alone."""
WAIT = 60.0


@dataclass(frozen=True)
class Request:
    """A frame and, where it is answered by numbers, what they are when its sequences are alone."""

    frame: Any
    alone_TD: torch.Tensor


class Alone:
    """The trunk's blocks as transformers runs them, for one sequence at a time."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._first_state = FirstState(part.model)

    def whole(self, h_ND: torch.Tensor) -> torch.Tensor:
        """A sequence from its first token to its last."""
        self._first_state.restore()
        return self.part.hidden(inputs_embeds=h_ND[None].double(), use_cache=False)[0]

    def new_cache(self) -> DynamicCache:
        """Without a configuration it keeps what sliding windows leave behind, and can be cropped at will."""
        return DynamicCache()

    def further(self, h_ND: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """The next tokens of a sequence, in one call."""
        self._first_state.restore()
        return self.part.hidden(inputs_embeds=h_ND[None].double(), past_key_values=cache, use_cache=True)[0]


class World:
    """A trunk with four silos, and the same blocks by themselves.

    Args:
        folder: a model of five blocks.
        directory: for the trunk's files.
    """

    def __init__(self, folder: Path, family: str, directory: Path) -> None:
        lora = {"rank": 4, "targets": targets_of(family)}
        recipe = make_recipe(folder, silos=SILOS, lora=lora, trunk={"gather": 0.0})
        self.service = TrunkService(recipe, RoleDirectory(directory))
        plain = load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk")
        adapters.add_adapter(plain, recipe.lora, 0, freeze_a=False)
        tensors = random_b(adapters.adapter_of(plain))
        for part in (plain, self.service._runner.part):
            adapters.load_adapter(part, tensors)
            part.model.double()
            if hasattr(part.config, "_experts_implementation"):
                part.config._experts_implementation = "eager"  # the other ones do not know 64 bits
        self.service._runner.dtype = torch.float64
        self.alone = Alone(plain)
        hello = greeting(Checkpoint(recipe.model.path), recipe)
        self._channels = {name: LoopbackChannel(self.service, name, greeting=hello) for name in SILOS}
        self._steps = dict.fromkeys(SILOS, 0)
        self._sessions = 0

    def close(self) -> None:
        self.service.stop()

    def farthest(self, draw: random.Random) -> float:
        """The largest distance of an answer in a random mix from what its sequences give alone."""
        self.service._decoding._chunk = draw.choice(CHUNKS)
        talks = [talk for name in SILOS for talk in self._talks(name, draw)]
        with Held(self.service):  # all of it waits at the trunk before the first pass
            answers = [(name, [self._send(name, one) for one in talk]) for name, talk in talks]
        far = [0.0]
        for (_, talk), (name, sent) in zip(talks, answers, strict=True):
            far += [self._distance(one, answer) for one, answer in zip(talk, sent, strict=True)]
            if isinstance(talk[0].frame, pb.Forward) and talk[0].frame.train:
                far.append(self._backward(name, talk[0], draw))
            if isinstance(talk[0].frame, pb.Decode):
                self._channels[name].call(pb.Close(session=talk[0].frame.session))
        return max(far)

    def _talks(self, name: str, draw: random.Random) -> Iterator[tuple[str, list[Request]]]:
        """What one silo asks: a training step, an evaluation, or up to two sessions."""
        kind = draw.choice(("train", "evaluate", "generate", "generate", "generate"))
        if kind != "generate":
            yield name, [self._forward(name, draw, train=kind == "train")]
        else:
            for _ in range(draw.randint(1, 2)):
                yield name, list(self._story(draw))

    def _forward(self, name: str, draw: random.Random, *, train: bool) -> Request:
        lengths = [any_length(draw) for _ in range(draw.randint(1, 3))]
        h_TD = self._states(sum(lengths), draw)
        self._steps[name] += 1
        with torch.no_grad():
            alone_TD = torch.cat([self.alone.whole(h_ND) for h_ND in torch.split(h_TD, lengths)])
        frame = pb.Forward(step=self._steps[name], lengths=lengths, hidden=codec.encode(h_TD, "fp32"), train=train)
        return Request(frame, alone_TD)

    def _story(self, draw: random.Random) -> Iterator[Request]:
        """A session: a prompt and further steps."""
        self._sessions += 1
        rows = [self.alone.new_cache() for _ in range(draw.choice((1, 1, 2, 3)))]
        lengths = [any_length(draw) for _ in rows]
        yield self._step(Step(self._sessions, 0, lengths), rows, draw)
        croppable = 0
        for number in range(1, draw.randint(1, 6)):
            kept = [draw.randrange(len(rows)) for _ in rows] if draw.random() < 0.2 else []
            forget, new = draw.randint(0, croppable), draw.choice((1, 1, 1, 2, 5, 20))
            step = Step(self._sessions, number, [new] * len(rows), forget, kept, new > 1 and draw.random() < 0.7)
            yield self._step(step, rows, draw)
            croppable += new - forget

    def _step(self, step: Step, rows: list[DynamicCache], draw: random.Random) -> Request:
        h_TD = self._states(sum(step.lengths), draw)
        for cache in rows if step.forget else ():
            cache.crop(-step.forget)
        if step.rows:
            rows[:] = [copy.deepcopy(rows[row]) for row in step.rows]
        with torch.no_grad():
            pieces = torch.split(h_TD, step.lengths)
            alone = [self._further(h_ND, cache, step.drafted) for h_ND, cache in zip(pieces, rows, strict=True)]
        return Request(step.frame(h_TD), torch.cat(alone))

    def _further(self, h_ND: torch.Tensor, cache: DynamicCache, drafted: bool) -> torch.Tensor:
        size = 1 if drafted else len(h_ND)
        return torch.cat([self.alone.further(piece, cache) for piece in torch.split(h_ND, size)])

    def _states(self, tokens: int, draw: random.Random) -> torch.Tensor:
        generator = torch.Generator().manual_seed(draw.getrandbits(31))
        return torch.randn(tokens, self.service._runner.width, generator=generator)

    def _send(self, name: str, request: Request) -> Answer:
        return self._channels[name].submit(request.frame)

    def _distance(self, request: Request, answer: Answer) -> float:
        """The largest of the sequences' distances: one must not hide behind another's larger values."""
        body: Any = answer.result(WAIT)
        got_TD = codec.decode(body.hidden, rows=body.hidden.rows, width=self.service._runner.width, codec="fp32")
        lengths = list(request.frame.lengths)
        pairs = zip(torch.split(got_TD, lengths), torch.split(request.alone_TD, lengths), strict=True)
        return max(distance(got.double(), alone) for got, alone in pairs)

    def _backward(self, name: str, request: Request, draw: random.Random) -> float:
        """The distance of the input's gradients from those that the sequences have alone."""
        frame, width = request.frame, self.service._runner.width
        gradient_TD = self._states(sum(frame.lengths), draw)
        sent = codec.encode(gradient_TD, "fp32")
        body: Any = self._channels[name].call(pb.Backward(step=frame.step, gradient=sent, reply=True))
        got_TD = codec.decode(body.gradient, rows=body.gradient.rows, width=width, codec="fp32")
        h_TD = codec.decode(frame.hidden, rows=frame.hidden.rows, width=width, codec="fp32")
        far, lengths = [], list(frame.lengths)
        pieces = (torch.split(tensor, lengths) for tensor in (h_TD, gradient_TD, got_TD))
        for h_ND, gradient_ND, got_ND in zip(*pieces, strict=True):
            leaf = h_ND.clone().requires_grad_()
            (alone_ND,) = torch.autograd.grad(self.alone.whole(leaf), leaf, gradient_ND.double())
            far.append(distance(got_ND, alone_ND))
        return max(far)


@dataclass(frozen=True)
class Step:
    """A session's step."""

    session: int
    number: int
    lengths: list[int]
    forget: int = 0
    rows: list[int] = field(default_factory=list)
    drafted: bool = False

    def frame(self, h_TD: torch.Tensor) -> pb.Decode:
        return pb.Decode(
            session=self.session,
            step=self.number,
            lengths=self.lengths,
            hidden=codec.encode(h_TD, "fp32"),
            forget=self.forget,
            rows=self.rows,
            drafted=self.drafted,
        )


def any_length(draw: random.Random) -> int:
    """Short, about the switch, or beyond it."""
    return draw.choice((draw.randint(1, 8), draw.randint(SWITCH - 2, SWITCH + 2), draw.randint(SWITCH, 3 * SWITCH)))
