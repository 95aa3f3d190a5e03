"""A silo whose channel reads the ledger's file as each frame leaves, and whose boundary shows what it is given.

Shapes: T tokens, W what crosses of the model's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import Message

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Batch, collate
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.events import Release
from isthmus.privacy.ledger import FileLedger, read_ledger
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import Recipe
from isthmus.silo.drafting.bridge import Bridge
from isthmus.silo.drafting.draft import Draft
from isthmus.silo.join import Silo, greeting, join, load_data
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.conftest import VOCABULARY, outbound
from tests.oracle.test_drafts import FarAway

EPOCHS = 2
LONG: dict[str, Any] = {"min_new_tokens": 24, "max_new_tokens": 24, "do_sample": False}


@dataclass(frozen=True)
class Sighting:
    """A frame with tensors, and how many releases the ledger's file held when it left."""

    request: Message
    tensors: tuple[Message, ...]
    noted: int


class Witness:
    """Sees each frame that leaves. One may watch several channels of a silo.

    Args:
        path: of the silo's ledger.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seen: list[Sighting] = []

    def look(self, request: Message) -> None:
        copy = type(request).FromString(request.SerializeToString())
        if tensors := tuple(tensors_in(copy)):
            self.seen.append(Sighting(copy, tensors, self._path.read_bytes().count(b'"release"')))

    def events(self) -> list[Release]:
        """What is on the disk."""
        return list(read_ledger(self._path).releases())

    def fresh(self) -> list[Sighting]:
        """Without frames whose very bytes left before."""
        first: dict[tuple[bytes, ...], Sighting] = {}
        for one in self.seen:
            first.setdefault(tuple(tensor.SerializeToString() for tensor in one.tensors), one)
        return list(first.values())


class Watched(LoopbackChannel):
    """A channel with a witness."""

    witness: Witness | None = None

    def submit(self, request: Message) -> Answer:
        if self.witness is not None:
            self.witness.look(request)
        return super().submit(request)


def tensors_in(message: Message) -> list[Message]:
    """All tensors of a frame, whatever field they are in."""
    if isinstance(message, pb.Matrix | pb.Tensor):
        return [message]
    inner = [value for _, value in message.ListFields()]
    parts = [part for value in inner for part in ([value] if isinstance(value, Message) else _listed(value))]
    return [tensor for part in parts for tensor in tensors_in(part)]


def _listed(value: Any) -> list[Message]:
    if isinstance(value, str | bytes | int | float):
        return []
    return [part for part in value if isinstance(part, Message)]


class Party:
    """A silo with data, joined to a trunk of its own, with a ledger on the disk."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        path = folder / "silo" / "ledger.jsonl"
        self.recipe = recipe
        self.service = TrunkService(recipe, RoleDirectory(folder / "trunk"))
        self.channel = Watched(self.service, "a", greeting=greeting(Checkpoint(recipe.model.path), recipe))
        places = {"releases": folder / "silo" / "released", "records": folder / "silo" / "records"}
        self.silo: Silo = join(recipe, "a", ledger=FileLedger(path, silo="a"), channel=self.channel, **places)
        self.witness = self.channel.witness = Witness(path)
        self.data: SiloData = load_data(recipe, "a", self.silo)
        self.given: list[tuple[torch.Tensor, str, Subjects]] = []
        """Clean tensor, path and subjects of each release."""
        self._release = self.silo.boundary.noted_release  # ``release`` goes that way, too
        self.silo.boundary.noted_release = self._shown  # type: ignore[method-assign]

    def _shown(self, h_TW: torch.Tensor, path: Any, step: int, subjects: Subjects) -> tuple[pb.Matrix, Release]:
        released = self._release(h_TW, path, step, subjects)
        self.given.append((h_TW.detach().clone(), path, subjects))
        return released

    def batches(self) -> list[Batch]:
        """All rows, in two."""
        rows, half = self.data.train, len(self.data.train) // 2
        return [collate(rows[:half], 0), collate(rows[half:], 0)]

    def prompt(self, rows: int) -> dict[str, torch.Tensor]:
        batch = collate(self.data.train[:rows], 0)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    def close(self) -> None:
        self.silo.close()
        self.service.stop()


Act = Callable[[Party], None]


def train(party: Party, step: Callable[..., Any] = train_step) -> None:
    parameters = [p for p in party.silo.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    party.silo.rounds.begin(1, ["a"])
    for number, batch in enumerate(party.batches() * EPOCHS, 1):
        step(party.silo.model, optimizer, batch)
        party.silo.rounds.commit(1, number, 1.0)


def micro_batches(party: Party) -> None:
    train(party, lambda *given: pipelined_step(*given, 3))


@torch.no_grad()
def evaluate(party: Party) -> None:
    for batch in party.batches() * 2:
        party.silo.model(**batch.inputs(), use_cache=False)


def generating(rows: int, **settings: Any) -> Act:
    return lambda party: party.silo.model.generate(**party.prompt(rows), **LONG | settings)


def draft(party: Party) -> None:
    torch.manual_seed(0)
    model = party.silo.model
    assistant = Draft(model, Bridge(model.bottom), torch.arange(VOCABULARY))
    assistant.draft_length = FarAway()
    model.generate(**party.prompt(1), **LONG, assistant_model=assistant)


@torch.no_grad()
def lose_a_session(party: Party) -> None:
    """The trunk loses it in the midst: all that was sent goes again."""
    session = party.silo.trunk.open_session()
    width = party.recipe.boundary.width or 32
    draw = torch.Generator().manual_seed(0)
    for number in range(6):
        session.step(outbound(session, torch.randn(24, width, generator=draw)))
        if number == 3:
            party.channel.call(pb.Close(session=session.id))


ACTS: dict[str, Act] = {
    "training": train,
    "micro-batches": micro_batches,
    "evaluation": evaluate,
    "greedy": generating(4),
    "without cache": generating(1, use_cache=False, min_new_tokens=5, max_new_tokens=5),
    "sampling": generating(4, do_sample=True),
    "beams": generating(2, num_beams=3),
    "prompt lookup": generating(1, prompt_lookup_num_tokens=4, min_new_tokens=60, max_new_tokens=60),
    "drafts": draft,
    "lost session": lose_a_session,
}
