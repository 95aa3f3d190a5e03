"""A good silo's speed, and the trunk's memory, while another silo floods the trunk.

``make bench-floods``. The trunk and the flooding silo are processes of their own. The good silo sends prepared hidden
states: tokens of a session, or training steps. Each is measured alone and during each flood.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.bare import made_up
from benchmarks.common.results import Results
from benchmarks.speed.foundation import bench_recipe
from benchmarks.speed.sessions import silos_recipe
from isthmus.demo.assets import smollm2
from isthmus.engines.local import at_address, local_recipe, serving
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, join
from isthmus.storage.record import RunDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb

CACHE = Path("build/demo")
NAMES = ("good", "greedy")
WIDTH, PROMPT, SECONDS, WINDOW, BATCH = 576, 64, 5.0, 40, (64, 64)
SESSIONS = 64
MARGIN = 64 * 2**20
"""Bytes above its start at which the trunk counts as returned."""


def evaluations() -> Iterator[pb.Forward]:
    hidden = codec.encode(torch.randn(512, WIDTH), "fp32")
    while True:
        yield pb.Forward(step=1, lengths=[64] * 8, hidden=hidden)


def forwards() -> Iterator[pb.Forward]:
    hidden, step = codec.encode(torch.randn(512, WIDTH), "fp32"), 0
    while True:
        step += 1
        yield pb.Forward(step=step, lengths=[64] * 8, hidden=hidden, train=True)


def held_sessions() -> Iterator[pb.Decode]:
    hidden, step = codec.encode(torch.randn(1, WIDTH), "fp32"), 0
    while True:
        for session in range(1, SESSIONS + 1):
            yield pb.Decode(session=session, step=step, lengths=[1], hidden=hidden)
        step += 1


def tiny_decodes() -> Iterator[pb.Decode]:
    hidden, session = codec.encode(torch.randn(1, WIDTH), "fp32"), 0
    while True:
        session += 1
        yield pb.Decode(session=session, step=0, lengths=[1], hidden=hidden)


FLOODS: dict[str, Callable[[], Iterator[Any]]] = {
    "evaluations": evaluations,
    "held sessions": held_sessions,
    "forwards without a backward": forwards,
    "tiny decodes": tiny_decodes,
}


def main() -> None:
    results = Results("floods", "make bench-floods")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        path = Path(temporary) / "run"
        recipe = silos_recipe(bench_recipe(smollm2(CACHE)), NAMES)
        run = RunDirectory.create(path, local_recipe(recipe, path))
        server, address = stack.enter_context(serving(run))
        recipe, pid = at_address(run.recipe(), address), server.pid
        silo = join(recipe, "good")
        stack.callback(silo.close)
        for what, work in (("tokens", tokens), ("training tokens", steps)):
            work(silo, SECONDS / 2)
            alone = work(silo, SECONDS)
            results.add(f"{what} alone", alone, "tokens/s")
            for flood in FLOODS:
                start = resident(pid)
                with flooding(recipe, flood) as done:
                    before, rate = done.value, work(silo, SECONDS)
                    answered, grown = (done.value - before) / SECONDS, resident(pid) - start
                results.add(f"{what} beside {flood}", rate, "tokens/s")
                results.add(f"{what} beside {flood}, against alone", rate / alone, "ratio", at_least=0.45)
                results.add(f"{flood} beside {what}: computed", answered, "requests/s")
                results.add(f"{flood} beside {what}: the trunk's memory grows by", grown / 2**20, "MiB")
                with replaced(recipe):
                    seconds = returned(pid, start)
                results.add(f"{flood} beside {what}: memory is back after", seconds, "s", at_most=5)
    print(f"written: {results.write()}")


def tokens(silo: Silo, seconds: float) -> float:
    """Tokens a second of one session."""
    session, count, one = silo.trunk.open_session(), 0, made_up(torch.randn(1, WIDTH), [1])
    session.step(made_up(torch.randn(PROMPT, WIDTH), [PROMPT]))
    started = time.monotonic()
    while time.monotonic() < started + seconds:
        session.step(one)
        count += 1
    session.close()
    return count / (time.monotonic() - started)


def steps(silo: Silo, seconds: float) -> float:
    """Tokens a second of forwards and backwards."""
    batch, count, started = made_up(torch.randn(sum(BATCH), WIDTH), list(BATCH)), 0, time.monotonic()
    while time.monotonic() < started + seconds:
        pending = silo.trunk.send(batch)
        output_TD = silo.trunk.receive(pending)
        assert output_TD is not None
        silo.trunk.receive(silo.trunk.send_gradient(pending, output_TD, reply=True))
        count += sum(BATCH)
    return count / (time.monotonic() - started)


@contextmanager
def flooding(recipe: Recipe, flood: str) -> Iterator[Any]:
    """The block runs once the flood is at its height. Yields the number of its requests that the trunk has computed."""
    context = multiprocessing.get_context("spawn")
    high, done = context.Event(), context.Value("d", 0.0)
    process = context.Process(target=_flood, args=(recipe, flood, high, done), daemon=True)
    process.start()
    high.wait(60)
    try:
        yield done
    finally:
        process.kill()
        process.join()


def _flood(recipe: Recipe, flood: str, high: Any, done: Any) -> None:
    torch.set_num_threads(1)
    silo = join(recipe, "greedy")
    waiting: deque[Future[Any]] = deque()
    for number, request in enumerate(FLOODS[flood]()):
        waiting.append(silo.trunk.channel.submit(request))
        if len(waiting) >= WINDOW:
            done.value += waiting.popleft().exception() is None
        if number == WINDOW - 2:
            high.set()


@contextmanager
def replaced(recipe: Recipe) -> Iterator[None]:
    """The block runs once another process has taken the flooding silo's place."""
    silo = join(recipe, "greedy")
    yield
    silo.close()


def resident(pid: int) -> int:
    """Bytes of another process in memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no memory of process {pid}")


def returned(pid: int, start: int, most: float = 5.5) -> float:
    """Seconds until a process has no more memory than at its start and a margin; infinite beyond ``most``."""
    began = time.monotonic()
    while resident(pid) > start + MARGIN:
        if time.monotonic() > began + most:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
