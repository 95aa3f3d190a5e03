"""isthmus's side: a silo's process that trains, or answers, beside a trunk process, and notes what both use.

``python -m benchmarks.speed.peer_fedsea.ours JOB``, started by ``measured`` with a file that tells it what to do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.common.proxy import CountingProxy
from benchmarks.common.rows import Values
from benchmarks.speed.peer_fedsea.checkout import Batches, Measured, read
from benchmarks.speed.peer_fedsea.meter import Meter
from isthmus.data.tokens import Tokens, collate
from isthmus.engines.local import at_address, create_run, local_recipe, serving
from isthmus.model.optim import build_optimizer
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, join
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RunDirectory

NAME = "bench"
LOOKED_UP = 5
"""Tokens of a draft by prompt lookup."""


@dataclass(frozen=True)
class Job:
    """What the silo's process does: it trains on batches, or answers a prompt with so many tokens."""

    run: str
    address: str
    trunk: int
    """The trunk's process id."""
    notes: str
    batches: Batches
    prompt: list[int]
    tokens: int = 0
    lookup: bool = False


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    silo = join(at_address(RunDirectory.open(Path(job.run)).recipe(), job.address), NAME)
    meter = Meter(Path(job.notes), job.trunk)
    meter.note(tokens=0)
    with silo:
        if job.batches:
            train(silo, job, meter)
        else:
            answer(silo, job, meter)


def train(silo: Silo, job: Job, meter: Meter) -> None:
    """A step for each batch, of which every token is learned."""
    recipe = RunDirectory.open(Path(job.run)).recipe()
    optimizer = build_optimizer([one for one in silo.model.parameters() if one.requires_grad], recipe.train)
    silo.model.train()
    silo.rounds.begin(1, [NAME])
    for number, rows in enumerate(job.batches, 1):
        batch = collate([Tokens(row[:1], row[1:]) for row in rows], 0)
        loss = train_step(silo.model, optimizer, batch).loss
        silo.rounds.commit(1, number, float(batch.weight))
        meter.note(loss=loss, tokens=1)


def answer(silo: Silo, job: Job, meter: Meter) -> None:
    """Greedy tokens after a prompt, with caches on both sides."""
    how = {"prompt_lookup_num_tokens": LOOKED_UP} if job.lookup else {}
    length = {"min_new_tokens": job.tokens, "max_new_tokens": job.tokens}
    ids = torch.tensor([job.prompt])
    silo.model.generate(ids, streamer=Noting(meter), do_sample=False, pad_token_id=2, **length, **how)


class Noting(BaseStreamer):
    """Notes what has been used whenever tokens come."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self._meter.note(tokens=value.numel())
        self._prompt = False

    def end(self) -> None: ...


def recipe_of(model: Path, changes: Values) -> Recipe:
    """A recipe of one silo without an evaluation, with these tables."""
    train = {"evaluate": False, "batch": 2} | changes.get("train", {})
    silo = [{"name": NAME, "train": "none.jsonl"} | changes.get("silo", {})]
    cut = {"path": str(model)} | changes.get("model", {})
    return Recipe.of(changes | {"model": cut, "train": train, "silo": silo})


def whole_run(recipe: Recipe) -> int:
    """Bytes of a whole training run with its root, in both directions, all updates and frames included."""
    with tempfile.TemporaryDirectory() as temporary:
        run = create_run(recipe, Path(temporary) / "run")
        with serving(run, ("trunk", "root")) as (_, address):
            proxy = CountingProxy(address)
            own = ["silo", str(run.recipe_path), NAME, "--trunk", proxy.address, "--root", proxy.address]
            with closing(proxy):
                subprocess.run([sys.executable, "-m", "isthmus", *own, "--run-dir", str(run.path)], check=True)
            return proxy.up + proxy.down


def measured(
    recipe: Recipe,
    *,
    batches: Batches | None = None,
    prompt: list[int] | None = None,
    tokens: int = 0,
    lookup: bool = False,
    counted: bool = False,
) -> Measured:
    """Run silo and trunk as two processes: training on ``batches``, or ``tokens`` tokens after ``prompt``.

    Args:
        lookup: whether drafts are looked up in the prompt.
        counted: whether bytes are counted, by a proxy between the two.
    """
    with tempfile.TemporaryDirectory() as temporary:
        path, file, notes = (Path(temporary) / name for name in ("run", "job.json", "notes.jsonl"))
        run = RunDirectory.create(path, local_recipe(recipe, path))
        with serving(run) as (trunk, address):
            proxy = CountingProxy(address)
            reached = proxy.address if counted else address
            job = Job(str(path), reached, trunk.pid, str(notes), batches or [], prompt or [], tokens, lookup)
            file.write_text(json.dumps(asdict(job)))
            with closing(proxy):
                subprocess.run([sys.executable, "-m", "benchmarks.speed.peer_fedsea.ours", str(file)], check=True)
            return Measured(read(notes), proxy.up, proxy.down)


if __name__ == "__main__":
    main()
