"""The boundary's share of a training step and of a decoded token: mechanism, charges, codec and ledger.

A loaded machine slows boundary and model alike, so what is reported is one as a share of the other: the median over
repeats, the largest of them, and the share of processor time, which waiting for others does not touch.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import Results
from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Batch, batches, collate
from isthmus.engines.local import at_address, serving
from isthmus.engines.process import RoleProcess
from isthmus.silo.join import Silo, join, load_data
from isthmus.silo.secrets import open_ledger
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RunDirectory

STEPS, ANSWERS, PROMPT, ANSWER = 10, 7, 128, 32
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Span:
    """One stretch of work."""

    started: float
    seconds: float
    processor: float
    """Seconds of processor time, of this thread."""


class Stopwatch:
    """Times every call of some of an object's methods."""

    def __init__(self, timed: Any, *names: str) -> None:
        self.spans: list[Span] = []
        for name in names:
            setattr(timed, name, self._timing(getattr(timed, name)))

    def _timing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started, processor = time.perf_counter(), time.thread_time()
            result = method(*arguments, **named)
            self.spans.append(Span(started, time.perf_counter() - started, time.thread_time() - processor))
            return result

        return call

    def take(self) -> list[Span]:
        """The spans since it was last asked."""
        taken, self.spans = self.spans, []
        return taken


def measure(results: Results, run: RunDirectory, name: str) -> None:
    """Training steps and answers of this silo, as its worker takes them, with a ledger on the disk."""
    recipe = run.recipe()
    with serving(run) as (trunk, address):
        ledger = open_ledger(run.role(name), recipe, name)
        silo = join(at_address(recipe, address), name, ledger=ledger, records=run.role(name).path / "records")
        data = load_data(recipe, name, silo)
        boundary = Stopwatch(silo.boundary, "release", "affordable")
        measure_steps(results, silo, data, recipe.train.batch, trunk, boundary)
        measure_tokens(results, silo, data, boundary, Stopwatch(ledger, "record"))
        silo.close()


def measure_steps(
    results: Results, silo: Silo, data: SiloData, batch: int, trunk: RoleProcess, boundary: Stopwatch
) -> None:
    optimizer = torch.optim.AdamW([p for p in silo.model.parameters() if p.requires_grad], lr=1e-4)
    silo.rounds.begin(1, [data.name])
    drawn = batches(data.train, batch, "overhead")
    before = processor_seconds(trunk) + time.process_time()
    shares, spans = [], list[Span]()
    for number in range(1, STEPS + 1):
        rows = next(drawn)
        started = time.perf_counter()
        silo.boundary.affordable([row.input for row in rows], [len(row.input) for row in rows])
        take_step(silo, optimizer, collate(rows, data.pad), number)
        seconds = time.perf_counter() - started
        taken = boundary.take()
        shares.append(100 * sum(span.seconds for span in taken) / seconds)
        spans += taken
    processor = processor_seconds(trunk) + time.process_time() - before
    results.add(f"boundary, share of {STEPS} training steps", statistics.median(shares), "%", at_most=3.0)
    results.add(f"boundary, share of {STEPS} training steps, the largest", max(shares), "%")
    own = 100 * sum(span.processor for span in spans) / processor
    results.add(f"boundary, share of {STEPS} training steps, processor time", own, "%", at_most=3.0)
    results.add("boundary, a training step", 1e3 * sum(span.seconds for span in spans) / STEPS, "ms")


def take_step(silo: Silo, optimizer: torch.optim.Optimizer, batch: Batch, number: int) -> None:
    step = train_step(silo.model, optimizer, batch)
    silo.rounds.commit(1, number, step.weight)


def measure_tokens(results: Results, silo: Silo, data: SiloData, boundary: Stopwatch, ledger: Stopwatch) -> None:
    """Answers of one row; a token lasts from the start of its release to that of the next."""
    ids = torch.tensor([[token for row in data.train for token in row.input][:PROMPT]])
    shares, releases, notes, tokens = [], list[Span](), list[Span](), list[float]()
    for _ in range(ANSWERS):
        silo.model.generate(ids, do_sample=False, min_new_tokens=ANSWER, max_new_tokens=ANSWER, pad_token_id=2)
        spans = boundary.take()[1:]  # the first is the prompt's
        answer, own = spans[-1].started - spans[0].started, sum(span.seconds for span in spans[:-1])
        shares.append(100 * own / answer)
        tokens.append(answer / len(spans[:-1]))
        releases, notes = releases + spans, notes + ledger.take()[1:]
    results.add("boundary, share of a decoded token", statistics.median(shares), "%")
    results.add(f"boundary, share of a decoded token, the largest of {ANSWERS} answers'", max(shares), "%")
    results.add("boundary, a decoded token", 1e3 * statistics.median(span.seconds for span in releases), "ms")
    noting = 1e3 * statistics.median(span.seconds for span in notes)
    results.add("boundary, a decoded token, of it the ledger", noting, "ms")
    own = 1e3 * statistics.median(span.processor for span in releases)
    results.add("boundary, a decoded token, processor time", own, "ms")
    results.add("a decoded token", 1e3 * statistics.median(tokens), "ms")


def processor_seconds(process: RoleProcess) -> float:
    """Of all threads of a process so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
