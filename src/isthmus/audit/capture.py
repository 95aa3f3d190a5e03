"""Capture of an adversary's view: a silo trains or generates in this process while a tap records its frames.

The frames come from the silo's own code. The true tokens are kept apart from the view.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from isthmus.attacks.view.frames import crossings_of, observed_updates
from isthmus.attacks.view.tap import Tap
from isthmus.attacks.view.view import Crossing, KnownPair, ObservedUpdate
from isthmus.audit.target import Target, Tensors
from isthmus.data.tokens import Tokens, collate
from isthmus.engines.zero_trunk import ZeroTrunk
from isthmus.errors import AttackError
from isthmus.federation.aggregator import root_service
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, accepted_adapters, connect_silo, greeting, load_data
from isthmus.silo.served import SharedAdapters
from isthmus.silo.trainer import evaluate
from isthmus.silo.worker import Worker
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire.channel import LoopbackChannel, Service

BATCH = 8
"""Rows per forward pass."""
MAX_TOKENS = 32
"""Tokens of an attacked answer."""


@dataclass(frozen=True)
class Captured:
    """The trunk's view of some rows, and their tokens."""

    crossings: tuple[Crossing, ...]
    truth: tuple[tuple[int, ...], ...]
    """Input tokens of each crossing, for scoring only."""


def capture_rows(target: Target, name: str, rows: Sequence[Tokens], given: SharedAdapters | None = None) -> Captured:
    """Frames of one forward and backward pass of a silo over each row, without optimizer steps.

    Batches have the recipe's size. Each crossing's weight is its batch's, as the commit states it.

    Args:
        name: the silo.
        given: as of ``tapped_silo``.
    """
    size, weights = target.recipe.train.batch, list[float]()
    with (
        torch.enable_grad(),
        restored_trunk(target) as service,
        tapped_silo(target, name, service, given) as (silo, tap),
    ):
        for start in range(0, len(rows), size):
            silo.model.zero_grad()
            batch = collate(list(rows[start : start + size]), _pad(silo)).to(silo.model.device)
            silo.model(**batch.inputs()).loss.backward()
            weights += [float(batch.weight)] * len(batch.input_ids)
        crossings = zip(crossings_of(name, tap.exchanges), weights, strict=True)
        weighed = tuple(replace(crossing, weight=weight) for crossing, weight in crossings)
        return Captured(weighed, tuple(tuple(row.input) for row in rows))


def measure_accuracy(target: Target, name: str, rows: list[Tokens]) -> float:
    """Accuracy of the target's model on these rows of a silo, 0 to 1, where answers are choices."""
    with restored_trunk(target) as service, tapped_silo(target, name, service) as (silo, _):
        return evaluate(silo.model, load_data(target.recipe, name, silo), rows)["accuracy"]


def capture_answers(target: Target, name: str, rows: Sequence[Tokens]) -> Captured:
    """Frames of a silo that generates a greedy answer of ``MAX_TOKENS`` tokens to each row's prompt."""
    with restored_trunk(target) as service, tapped_silo(target, name, service) as (silo, tap):
        truth = [_generate(silo, row) for row in rows]
        return Captured(crossings_of(name, tap.exchanges), tuple(truth))


@torch.no_grad()
def capture_pairs(
    target: Target, name: str, rows: Sequence[Tokens], *, trained: bool = True, draws: int = 1
) -> tuple[KnownPair, ...]:
    """An adversary's own rows, each with its crossing of a silo's boundary, in the rows' order.

    Args:
        name: the silo whose boundary they cross.
        trained: use the run's adapters; False: the recipe's initial ones, which anyone can compute.
        draws: crossings per row, each with fresh noise. The result holds all rows once per draw.
    """
    own = Target(target.recipe, target.run if trained else None)
    pairs: list[KnownPair] = []
    for _ in range(draws):
        with tapped_silo(own, name, ZeroTrunk(target.recipe)) as (silo, tap):
            for start in range(0, len(rows), BATCH):
                batch = collate(list(rows[start : start + BATCH]), _pad(silo)).to(silo.model.device)
                silo.model(**batch.inputs(), use_cache=False)
            crossings = crossings_of(name, tap.exchanges)
        pairs += [KnownPair(tuple(row.input), crossing) for row, crossing in zip(rows, crossings, strict=True)]
    return tuple(pairs)


def capture_round(target: Target, name: str) -> tuple[ObservedUpdate, ...]:
    """The updates that the root receives in one more round, in which this silo trains alone.

    Raises:
        AttackError: the silo's LoRA rank is not the recipe's ``lora.rank``.
    """
    recipe = training_alone(target, name, target.completed + 1)
    if recipe.of_silo(name).lora.rank != recipe.lora.rank:
        raise AttackError(
            f"{name} has its own LoRA rank, {recipe.of_silo(name).lora.rank}",
            remedy=f"attack a silo of rank lora.rank = {recipe.lora.rank}",
        )
    with tempfile.TemporaryDirectory() as temporary, restored_trunk(target, recipe) as service:
        root = RoleDirectory(Path(temporary) / "root")
        if target.completed:
            root.save_round(target.completed, {"shared": dict(target.shared())})
        tap = Tap(LoopbackChannel(root_service(recipe, root, trunk=service), name))
        own = recipe.of_silo(name, ranked=False)
        trunk = Tap(LoopbackChannel(service, name, greeting=greeting(Checkpoint(recipe.model.path), own)))
        worker = Worker(recipe, name, RoleDirectory(Path(temporary) / name), trunk=trunk, root=tap)
        try:
            worker.run()
        finally:
            worker.close()
        lengths = tuple(one.length for one in crossings_of(name, trunk.exchanges) if one.kind == "train")
        return tuple(replace(one, lengths=lengths) for one in observed_updates(name, tap.exchanges))


@contextmanager
def tapped_silo(
    target: Target, name: str, service: Service, given: SharedAdapters | None = None
) -> Iterator[tuple[Silo, Tap]]:
    """A silo with the target's adapters, connected to ``service`` through a tap; yields both.

    Args:
        given: adapters of a later round that it accepts as its worker does, in the target's place; None: none.
    """
    recipe = target.recipe.of_silo(name, ranked=False)
    hello = greeting(Checkpoint(recipe.model.path), recipe)
    with tempfile.TemporaryDirectory() as temporary:
        tap = Tap(LoopbackChannel(service, name, greeting=hello, limit=recipe.wire.max_frame_bytes))
        silo = connect_silo(recipe, name, channel=tap, releases=Path(temporary) / "released")
        accepted = _accepted(target, silo, given) if given is not None else target.shared()
        for part in silo.parts:
            adapters.load_adapter(part, accepted)
        try:
            yield silo, tap
        finally:
            silo.close()


@contextmanager
def restored_trunk(target: Target, recipe: Recipe | None = None) -> Iterator[TrunkService]:
    """A trunk in this process with the target's trunk adapter. It writes nothing to the run directory.

    Args:
        recipe: the trunk's recipe; None: the target's.
    """
    with tempfile.TemporaryDirectory() as temporary:
        directory = RoleDirectory(Path(temporary))
        if target.run is not None and target.completed:
            directory.save_round(target.completed, target.run.role("trunk").load_round(target.completed))
        service = TrunkService(recipe or target.recipe, directory)
        try:
            service.restore(target.completed)
            yield service
        finally:
            service.stop()


def training_alone(target: Target, name: str, rounds: int) -> Recipe:
    """The target's recipe with so many rounds and this silo only."""
    recipe = target.recipe
    train = recipe.train.model_copy(update={"rounds": rounds, "evaluate": False})
    root = recipe.root.model_copy(update={"minimum": None})
    return recipe.model_copy(update={"train": train, "root": root, "silo": (recipe.party(name),)})


def _accepted(target: Target, silo: Silo, given: SharedAdapters) -> Tensors:
    """These adapters after a silo that has the target's has accepted them from a root.

    Raises:
        ProtocolError, FrameError: it refuses them.
    """
    train = target.recipe.train.model_copy(update={"rounds": max(given.completed, target.recipe.train.rounds)})
    recipe = target.recipe.model_copy(update={"train": train})
    received = codec.decode_named(codec.encode_named(given.tensors), adapters.shared_shapes(silo.parts))
    checks = accepted_adapters(recipe, silo, None)
    if target.completed:
        checks.accept(SharedAdapters(target.completed, "", target.shared()))
    checks.accept(SharedAdapters(given.completed, "", received))
    return received


def _generate(silo: Silo, row: Tokens) -> tuple[int, ...]:
    """Generate an answer; returns the tokens that crossed: the prompt and the answer without its last token."""
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
