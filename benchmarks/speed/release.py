"""Three epochs over the same rows with a frozen bottom: releasing each example once, against at every forward.

``make bench-release``.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import Message

from benchmarks.common.results import Results
from benchmarks.speed.foundation import seconds
from isthmus.data.tokens import Batch, Tokens, collate
from isthmus.demo.assets import smollm2
from isthmus.engines.local import at_address, local_recipe, serving
from isthmus.privacy.ledger import MemoryLedger
from isthmus.recipe import Recipe
from isthmus.silo.join import join
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RunDirectory
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel

CACHE = Path("build/demo")
ROWS, BATCH, EPOCHS = 16, 4, 3


def main() -> None:
    results = Results("release", "make bench-release")
    torch.set_num_threads(1)  # a core for the silo, one for the trunk
    with ExitStack() as stack:
        silos = {
            "at every forward": stack.enter_context(training(once=False)),
            "once": stack.enter_context(training(once=True)),
        }
        for epoch in range(1, EPOCHS + 1):
            for name, silo in silos.items():
                silo.take_epoch()
                report(results, f"released {name}, epoch {epoch}", silo, goal=name == "once" and epoch > 1)
    print(f"written: {results.write()}")


def report(results: Results, name: str, silo: Training, *, goal: bool) -> None:
    """Bytes and ledger events of an epoch's forwards, and the time of its steps."""
    most = 0 if goal else None
    results.add(f"{name}: hidden bytes up", silo.channel.hidden, "B", at_most=most)
    results.add(f"{name}: forward events in the ledger", silo.forward_events(), "events", at_most=most)
    results.add(f"{name}: all bytes of forward frames up", silo.channel.frames, "B")
    results.add(f"{name}: gradient bytes down", silo.channel.down, "B")
    results.add(f"{name}: step, median", statistics.median(silo.steps), "s")
    results.add(f"{name}: step, longest", max(silo.steps), "s")


class Counting:
    """A channel that counts what its forwards send."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.reset()

    def reset(self) -> None:
        self.hidden = self.frames = self.down = 0

    def submit(self, request: Message) -> Answer:
        if isinstance(request, pb.Forward | pb.Keep):
            self.hidden += len(request.hidden.data)
            self.frames += frames.wrap(request, id=1).ByteSize()
        answer = self._channel.submit(request)
        if isinstance(request, pb.Backward):
            answer.add_done_callback(self._count_down)
        return answer

    def call(self, request: Message) -> Any:
        return self.submit(request).result()

    def _count_down(self, answer: Answer) -> None:
        if answer.exception() is None:
            self.down += len(answer.result().gradient.data)  # type: ignore[attr-defined]


class Training:
    """One silo's optimizer steps over rows that come again every epoch."""

    def __init__(self, recipe: Recipe) -> None:
        self._ledger = MemoryLedger()
        self.silo = join(recipe, "bench", ledger=self._ledger)
        self.channel = Counting(self.silo.trunk.channel)
        self._close_channel, self.silo.trunk.channel = self.silo.trunk.channel.close, self.channel  # type: ignore[assignment]
        self._optimizer = torch.optim.AdamW([p for p in self.silo.model.parameters() if p.requires_grad], lr=5e-4)
        self._batches = made_up_batches()
        self._number = 0
        self.steps: list[float] = []
        self.silo.rounds.begin(1, ["bench"])

    def take_epoch(self) -> None:
        self.channel.reset()
        self._ledger.releases.clear()
        self.steps = [seconds(lambda batch=batch: self._step(batch)) for batch in self._batches]  # type: ignore[misc]

    def forward_events(self) -> int:
        return sum(release.path == "forward" for release in self._ledger.releases)

    def end(self) -> None:
        self._close_channel()

    def _step(self, batch: Batch) -> None:
        step = train_step(self.silo.model, self._optimizer, batch)
        self._number += 1
        self.silo.rounds.commit(1, self._number, step.weight)


@contextmanager
def training(*, once: bool) -> Iterator[Training]:
    """A silo with a trunk in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "run"
        recipe = Recipe.of(
            {
                "threads": 1,
                "model": {"path": str(smollm2(CACHE)), "bottom": 2, "top": 2},
                "lora": {"freeze_bottom": True},
                "boundary": {"release_once": once},
                "train": {"evaluate": False, "steps": 100_000},
                "silo": [{"name": "bench", "train": "none.jsonl"}],
            }
        )
        run = RunDirectory.create(path, local_recipe(recipe, path))
        with serving(run) as (_, address):
            silo = Training(at_address(run.recipe(), address))
            yield silo
            silo.end()


def made_up_batches() -> list[Batch]:
    """Rows of 40 to 85 tokens, of which the last two are the answer."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for number in range(ROWS):
        ids = torch.randint(100, 40_000, (40 + 3 * number,), generator=draw).tolist()
        rows.append(Tokens(ids[:-2], ids[-2:]))
    return [collate(rows[start : start + BATCH], 0) for start in range(0, ROWS, BATCH)]


if __name__ == "__main__":
    main()
