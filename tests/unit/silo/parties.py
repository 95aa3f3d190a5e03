"""A trunk and a silo that releases each example once, on folders of their own; either can start again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import Message

from isthmus.data.tokens import Batch, Tokens, collate
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.events import Release
from isthmus.privacy.ledger import MemoryLedger
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.join import Silo, greeting, join
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.remote import RemoteTrunk
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel

WIDTH, EPOCHS = 32, 3
ROWS = [Tokens(list(range(4, 4 + n)), [50 + n, 60 + n]) for n in (3, 9, 5, 7)]
TOKENS = [len(row.prompt) + 1 for row in ROWS]
MATRIX = 4 * WIDTH
"""Bytes of one token's hidden states."""
HEADER, PER_ROW = 16, 10
"""Bytes of a forward by numbers: at most so many, and for each row its number and length."""


class Tap(LoopbackChannel):
    """A channel that keeps what was sent."""

    sent: list[Message]

    def submit(self, request: Message) -> Answer:
        self.__dict__.setdefault("sent", []).append(type(request).FromString(request.SerializeToString()))
        return super().submit(request)

    def take(self, kind: type[Any]) -> list[Any]:
        return [request for request in self.sent if isinstance(request, kind)]


class Party:
    """Trunk and silo on folders of their own; either can start again."""

    def __init__(self, recipe: Recipe, folder: Path, *, ledger: Any = None) -> None:
        self.recipe, self.folder, self.ledger = recipe, folder, ledger or MemoryLedger()
        self.ran: list[int] = []
        self.start_trunk()
        self.start_silo()

    def start_trunk(self) -> None:
        if hasattr(self, "service"):
            self.service.stop()
        self.service = TrunkService(self.recipe, RoleDirectory(self.folder / "trunk"))

    def start_silo(self) -> None:
        hello = greeting(Checkpoint(self.recipe.model.path), self.recipe)
        self.tap = Tap(self.service, "a", greeting=hello)
        self.silo: Silo = join(
            self.recipe, "a", ledger=self.ledger, channel=self.tap, releases=self.folder / "silo" / "released"
        )
        self.silo.rounds.by_hand = True
        bottom = self.silo.model.bottom
        self.optimizer = torch.optim.SGD([p for p in self.silo.model.parameters() if p.requires_grad], lr=0.1)
        bottom.family.backbone_of(bottom.model).register_forward_hook(
            lambda *call: self.ran.append(len(call[-1].last_hidden_state))
        )

    @property
    def trunk(self) -> RemoteTrunk:
        return self.silo.trunk

    @property
    def boundary(self) -> Boundary:
        return self.silo.boundary

    def forget(self) -> None:
        """Count from here on."""
        self.ran.clear()
        self.tap.sent = []
        getattr(self.ledger, "releases", []).clear()

    def charged(self) -> list[int]:
        """Tokens of each forward release in the ledger."""
        releases: list[Release] = self.ledger.releases
        return [release.rows for release in releases if release.path == "forward"]

    def kept(self) -> list[pb.Keep]:
        return self.tap.take(pb.Keep)

    def hidden_bytes(self) -> int:
        return sum(len(request.hidden.data) for kind in (pb.Keep, pb.Forward) for request in self.tap.take(kind))

    def epoch(self, *, micro_batches: int = 1, size: int = 2) -> list[float]:
        """Steps over all rows, without the trunk's optimizer; returns their losses."""
        return [
            train_step(self.silo.model, self.optimizer, part).loss
            if micro_batches == 1
            else pipelined_step(self.silo.model, self.optimizer, part, micro_batches).loss
            for part in batches(size)
        ]

    @torch.no_grad()
    def logits(self, rows: list[Tokens] = ROWS) -> torch.Tensor:
        return self.silo.model(**collate(rows, 0).inputs(), use_cache=False).logits


Start = Callable[..., Party]


def batches(size: int = 2) -> list[Batch]:
    return [collate(ROWS[start : start + size], 0) for start in range(0, len(ROWS), size)]
