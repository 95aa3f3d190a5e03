"""A good silo's speed, and the trunk's memory, while another silo floods the trunk.

``make bench-floods``. The trunk and the flooding silo are processes of their own. The good silo sends prepared hidden
states: tokens of a session, or training steps. Each flood is measured ``PAIRS`` times, each time beside the good silo
alone right before.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import queue
import secrets
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import torch

from benchmarks.common.bare import made_up
from benchmarks.common.results import Results, repeated
from benchmarks.speed.foundation import bench_recipe
from benchmarks.speed.sessions import silos_recipe
from isthmus.demo.assets import smollm2
from isthmus.engines.local import at_address, local_recipe, serving
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, greeting, join
from isthmus.storage.record import RunDirectory
from isthmus.wire import codec, frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity
from isthmus.wire.server import INSTANCE_KEY, METHOD_PATH

CACHE = Path("build/demo")
NAMES = ("good", "greedy")
WIDTH, PROMPT, SECONDS, WINDOW, BATCH = 576, 64, 5.0, 40, (64, 64)
SESSIONS, STREAMS, PAIRS = 64, 40, 3
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


class Greedy:
    """The flooding silo: what its certificate lets it open."""

    def __init__(self, recipe: Recipe, hello: bytes) -> None:
        self._recipe, self._hello = recipe, pb.Hello.FromString(hello)
        self._identity = Identity.load(Path(recipe.wire.certificates), "greedy", "silo")

    def channel(self) -> GrpcChannel:
        """A channel that waits for answers, as an honest silo's."""
        limit = self._recipe.wire.max_frame_bytes
        return GrpcChannel(self._recipe.trunk.address, "Trunk", self._identity, greeting=self._hello, limit=limit)

    def stream(self, requests: Iterator[bytes]) -> tuple[grpc.Channel, Any]:
        """A connection and a stream of its own, which sends the greeting and these bytes."""
        self._hello.instance = secrets.token_hex(8)
        first = frames.wrap(self._hello).SerializeToString()
        options = (("grpc.ssl_target_name_override", "trunk"), ("grpc.use_local_subchannel_pool", 1))
        opened = grpc.secure_channel(self._recipe.trunk.address, self._identity.client_credentials(), options)
        call = opened.stream_stream(METHOD_PATH.format("Trunk"), None, None)
        return opened, call(itertools.chain([first], requests), metadata=((INSTANCE_KEY, secrets.token_hex(8)),))


def asking(requests: Callable[[], Iterator[Any]]) -> Callable[[Greedy], Iterator[int]]:
    """A flood of these requests, ``WINDOW`` at a time. Yields whether the trunk computed one, after each."""

    def flood(greedy: Greedy) -> Iterator[int]:
        waiting: deque[Future[Any]] = deque()
        with closing(greedy.channel()) as channel:
            for request in requests():
                waiting.append(channel.submit(request))
                yield int(len(waiting) >= WINDOW and waiting.popleft().exception() is None)

    return flood


def many_streams(greedy: Greedy) -> Iterator[int]:
    """Streams of one certificate without end, each as another process of it; the last ``STREAMS`` stay open."""
    opened: deque[grpc.Channel] = deque()
    while True:
        silent: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        channel, call = greedy.stream(iter(silent.get, b""))
        next(call)
        opened.append(channel)
        if len(opened) > STREAMS:
            opened.popleft().close()
        yield 1


def unread_answers(greedy: Greedy) -> Iterator[int]:
    """Requests whose answers nobody reads. The server stops reading, too, once they reach its bound."""
    sent: queue.SimpleQueue[int] = queue.SimpleQueue()

    def requests() -> Iterator[bytes]:
        for id, request in enumerate(evaluations(), start=1):
            sent.put(id)
            yield frames.wrap(request, id=id).SerializeToString()

    kept = greedy.stream(requests())  # closed if it were let go of
    while kept:
        sent.get()
        yield 1


FLOODS: dict[str, Callable[[Greedy], Iterator[int]]] = {
    "evaluations": asking(evaluations),
    "held sessions": asking(held_sessions),
    "forwards without a backward": asking(forwards),
    "tiny decodes": asking(tiny_decodes),
    "many streams": many_streams,
    "unread answers": unread_answers,
}


def main() -> None:
    results = Results("floods", "make bench-floods")
    torch.set_num_threads(1)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        path = Path(temporary) / "run"
        recipe = silos_recipe(bench_recipe(smollm2(CACHE)), NAMES)
        run = RunDirectory.create(path, local_recipe(recipe, path))
        server, address = stack.enter_context(serving(run))
        recipe, pid = at_address(run.recipe(), address), server.pid
        hello = greeting(Checkpoint(recipe.model.path), recipe).SerializeToString()
        silo = join(recipe, "good")
        stack.callback(silo.close)
        works: dict[str, Callable[[Silo, float], float]] = {"tokens": tokens, "training tokens": steps}
        for work in works.values():
            work(silo, SECONDS)
        first, found = settled(pid), defaultdict[str, list[float]](list)
        for _, (what, work), flood in itertools.product(range(PAIRS), works.items(), FLOODS):
            for name, value in pair(recipe, hello, silo, pid, work, flood).items():
                found[f"{flood}, {what}: {name}"].append(value)
        note(results, found, works)
        results.write()  # the last measurement takes minutes
        results.add("memory after all floods, above that before the first", (settled(pid) - first) / 2**20, "MiB")
        start = settled(pid)
        with flooding(recipe, hello, "unread answers"):
            time.sleep(SECONDS)
        results.add("unread answers, no process comes back: held", (resident(pid) - start) / 2**20, "MiB")
        seconds = returned(pid, start, 3 * recipe.waits.reach)
        results.add("unread answers, no process comes back: memory is back after", seconds, "s", at_most=5)
    for when, value in (("start", load[0]), ("end", os.getloadavg()[0])):
        results.add(f"processes that wanted to run on this machine's {os.cpu_count()} cores, at the {when}", value, "")
    print(f"written: {results.write()}")


def pair(
    recipe: Recipe, hello: bytes, silo: Silo, pid: int, work: Callable[[Silo, float], float], flood: str
) -> dict[str, float]:
    """The good silo's speed alone and beside a flood, and what the flood does to the trunk's memory."""
    alone, start = work(silo, SECONDS), settled(pid)
    with flooding(recipe, hello, flood) as done:
        before, rate = done.value, work(silo, SECONDS)
        answered, grown = (done.value - before) / SECONDS, resident(pid) - start
    with replaced(recipe):
        seconds = returned(pid, start)
    print(f"  {flood}: {alone:.1f}, {rate:.1f}, {grown / 2**20:.0f} MiB, {seconds:.2f} s", flush=True)
    return {
        "alone": alone,
        "beside it": rate,
        "of alone": rate / alone,
        "its requests": answered,
        "memory grows by": grown / 2**20,
        "memory is back after": seconds,
    }


def note(results: Results, found: dict[str, list[float]], works: dict[str, Any]) -> None:
    units = {
        "alone": "tokens/s",
        "beside it": "tokens/s",
        "of alone": "ratio",
        "its requests": "requests/s",
        "memory grows by": "MiB",
        "memory is back after": "s",
    }
    goals: dict[str, dict[str, float]] = {"of alone": {"at_least": 0.45}, "memory is back after": {"at_most": 5}}
    for (what, flood), (name, unit) in itertools.product(itertools.product(works, FLOODS), units.items()):
        measure = f"{flood}, {what}: {name}"
        repeated(results, measure, found[measure], unit, **goals.get(name, {}))


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
def flooding(recipe: Recipe, hello: bytes, flood: str) -> Iterator[Any]:
    """The block runs once the flood is at its height. Yields the number of its requests that the trunk has computed;
    of unread answers, those sent; of streams, those opened."""
    context = multiprocessing.get_context("spawn")
    high, done = context.Event(), context.Value("d", 0.0)
    process = context.Process(target=_flood, args=(recipe, hello, flood, high, done), daemon=True)
    process.start()
    high.wait(60)
    try:
        yield done
    finally:
        process.kill()
        process.join()


def _flood(recipe: Recipe, hello: bytes, flood: str, high: Any, done: Any) -> None:
    torch.set_num_threads(1)
    for number, answered in enumerate(FLOODS[flood](Greedy(recipe, hello))):
        done.value += answered
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


def settled(pid: int) -> int:
    """Bytes of an idle process in memory, once it has returned what it can."""
    time.sleep(1.5)
    return resident(pid)


def returned(pid: int, start: int, most: float = 5.5) -> float:
    """Seconds until a process has no more memory than at its start and a margin; infinite beyond ``most``."""
    began = time.monotonic()
    while resident(pid) > start + MARGIN:
        if time.monotonic() > began + most:
            return math.inf
        time.sleep(0.05)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
