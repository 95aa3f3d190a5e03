"""Capturing: a silo's rows pushed through its own boundary in this process, behind a tap, to fill an adversary's view.

What is captured is what the silo's own code sends in training and inference; the truth stays apart from the view.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from google.protobuf.message import Message

from isthmus.attacks.view.frames import contributions_of, crossings_of
from isthmus.attacks.view.tap import Tap
from isthmus.attacks.view.view import Contribution, Crossing, Pair
from isthmus.data.tokens import Tokens, collate
from isthmus.errors import AttackError, ProtocolError
from isthmus.federation.aggregator import RootService
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, greeting, join, known_data
from isthmus.silo.trainer import evaluate
from isthmus.silo.worker import Worker
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, Service

BATCH = 8
MAX_TOKENS = 32
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """The federation whose boundary is attacked: a recipe and, if it has run, what its rounds have learned."""

    recipe: Recipe
    run: RunDirectory | None = None

    @property
    def completed(self) -> int:
        """Rounds behind the adapters."""
        return self.run.completed() if self.run is not None else 0

    def shared(self) -> Tensors:
        """The ends' adapters as root and silos have them; empty before the first round."""
        return self._round("root")["shared"]

    def trunk_adapter(self) -> Tensors:
        return self._round("trunk")["adapter"]

    def _round(self, role: str) -> dict[str, Tensors]:
        if self.run is None or not self.completed:
            return {"shared": {}, "adapter": {}}
        return self.run.role(role).load_round(self.completed)


@dataclass(frozen=True)
class Captured:
    """What the trunk sees of some rows, and what they really were: the latter is for scores only."""

    crossings: tuple[Crossing, ...]
    truth: tuple[tuple[int, ...], ...]


class Silence:
    """A service in a trunk's place that answers with zeros: for rows of which only the way up counts."""

    def __init__(self, recipe: Recipe) -> None:
        self._codec = recipe.boundary.codec.forward_down
        self._width: int = Checkpoint(recipe.model.path).config.hidden_size

    def handle(self, peer: str, request: Message) -> Answer:
        answer: Answer = Answer()
        answer.set_result(self._answer(request))
        return answer

    def _answer(self, request: Message) -> Message:
        if isinstance(request, pb.Hello):
            return pb.Welcome()
        if isinstance(request, pb.Keep):
            return pb.Kept()
        if isinstance(request, pb.Forward):
            return pb.Hidden(hidden=codec.encode(torch.zeros(sum(request.lengths), self._width), self._codec))
        raise ProtocolError(f"silence does not answer {type(request).__name__}", remedy="use a trunk")


def capture_rows(source: Source, name: str, rows: Sequence[Tokens]) -> Captured:
    """One training step each of these rows of a silo (forward and backward, no optimizer step).

    Steps have as many rows as the recipe's, and weights as their commits would tell.
    """
    size, weights = source.recipe.train.batch, list[float]()
    with torch.enable_grad(), opened_trunk(source) as service, tapped(source, name, service) as (silo, tap):
        for start in range(0, len(rows), size):
            silo.model.zero_grad()
            batch = collate(list(rows[start : start + size]), _pad(silo)).to(silo.model.device)
            silo.model(**batch.inputs()).loss.backward()
            weights += [float(batch.supervised)] * len(batch.input_ids)
        crossings = zip(crossings_of(name, tap.exchanges), weights, strict=True)
        weighed = tuple(replace(crossing, weight=weight) for crossing, weight in crossings)
        return Captured(weighed, tuple(tuple(row.input) for row in rows))


def measure(source: Source, name: str, rows: list[Tokens]) -> float:
    """The task's accuracy on these rows of a silo, where answers are choices."""
    with opened_trunk(source) as service, tapped(source, name, service) as (silo, _):
        return evaluate(silo.model, known_data(source.recipe, name, silo), rows)["accuracy"]


def capture_answers(source: Source, name: str, rows: Sequence[Tokens]) -> Captured:
    """Greedy answers to these rows' prompts, ``MAX_TOKENS`` tokens each."""
    with opened_trunk(source) as service, tapped(source, name, service) as (silo, tap):
        truth = [_answered(silo, row) for row in rows]
        return Captured(crossings_of(name, tap.exchanges), tuple(truth))


@torch.no_grad()
def capture_pairs(
    source: Source, name: str, rows: Sequence[Tokens], *, trained: bool = True, draws: int = 1
) -> tuple[Pair, ...]:
    """Rows of an adversary's own, pushed through a silo's boundary, with what arrives of them.

    Args:
        trained: with the adapters of the run; else with those that the recipe starts with, which anybody can make.
        draws: how often, each time with fresh noise.
    """
    own = Source(source.recipe, source.run if trained else None)
    pairs: list[Pair] = []
    for _ in range(draws):
        with tapped(own, name, Silence(source.recipe)) as (silo, tap):
            for start in range(0, len(rows), BATCH):
                batch = collate(list(rows[start : start + BATCH]), _pad(silo)).to(silo.model.device)
                silo.model(**batch.inputs(), use_cache=False)
            crossings = crossings_of(name, tap.exchanges)
        pairs += [Pair(tuple(row.input), crossing) for row, crossing in zip(rows, crossings, strict=True)]
    return tuple(pairs)


def capture_round(source: Source, name: str) -> tuple[Contribution, ...]:
    """What the root sees of one round in which this silo trains alone, after those that the run has finished.

    Raises:
        AttackError: the silo's adapters are of another rank than the attacks' own.
    """
    recipe = _alone(source, name)
    if recipe.of_silo(name).lora.rank != recipe.lora.rank:
        raise AttackError(f"{name} has adapters of a rank of its own", remedy="attack a silo that has lora.rank")
    with tempfile.TemporaryDirectory() as temporary, opened_trunk(source, recipe) as service:
        root = RoleDirectory(Path(temporary) / "root")
        if source.completed:
            root.save_round(source.completed, {"shared": dict(source.shared())})
        tap = Tap(LoopbackChannel(RootService(recipe, root), name))
        trunk = Tap(LoopbackChannel(service, name, greeting=greeting(Checkpoint(recipe.model.path), recipe)))
        worker = Worker(recipe, name, RoleDirectory(Path(temporary) / name), trunk=trunk, root=tap)
        try:
            worker.run()
        finally:
            worker.close()
        lengths = tuple(one.length for one in crossings_of(name, trunk.exchanges) if one.kind == "train")
        return tuple(replace(one, lengths=lengths) for one in contributions_of(name, tap.exchanges))


@contextmanager
def tapped(source: Source, name: str, service: Service) -> Iterator[tuple[Silo, Tap]]:
    """The silo with the source's adapters, its way to the service behind a tap."""
    recipe = source.recipe
    hello = greeting(Checkpoint(recipe.model.path), recipe)
    with tempfile.TemporaryDirectory() as temporary:
        tap = Tap(LoopbackChannel(service, name, greeting=hello, limit=recipe.wire.max_frame_bytes))
        silo = join(recipe, name, channel=tap, releases=Path(temporary) / "released")
        for part in silo.parts:
            adapters.load_adapter(part, source.shared())
        try:
            yield silo, tap
        finally:
            silo.close()


@contextmanager
def opened_trunk(source: Source, recipe: Recipe | None = None) -> Iterator[TrunkService]:
    """A trunk in this process that writes nothing into the run, with its adapter after the last round."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = RoleDirectory(Path(temporary))
        if source.run is not None and source.completed:
            directory.save_round(source.completed, source.run.role("trunk").load_round(source.completed))
        service = TrunkService(recipe or source.recipe, directory)
        try:
            service.restore(source.completed)
            yield service
        finally:
            service.stop()


def _alone(source: Source, name: str) -> Recipe:
    """The recipe with one more round, for this silo alone."""
    recipe = source.recipe
    train = recipe.train.model_copy(update={"rounds": source.completed + 1, "evaluate": False})
    root = recipe.root.model_copy(update={"minimum": None})
    return recipe.model_copy(update={"train": train, "root": root, "silo": (recipe.party(name),)})


def _answered(silo: Silo, row: Tokens) -> tuple[int, ...]:
    """All tokens that crossed: those of the prompt and, but for the last, of the answer."""
    ids_BL = torch.tensor([row.prompt], device=silo.model.device)
    output_BL = silo.model.generate(
        input_ids=ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        pad_token_id=_pad(silo),
    )
    return tuple(output_BL[0, :-1].tolist())


def _pad(silo: Silo) -> int:
    return int(silo.tokenizer.pad_token_id or 0)
