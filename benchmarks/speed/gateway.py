"""The gateway beside ``isthmus generate``, and sixteen requests at once beside one. ``make bench-gateway``.

Three processes on the machine's cores: this one is the client, or for ``generate`` the silo; a gateway; and of each its
trunk. Only one of the two silos works at a time, in turn; ratios are taken pair by pair, since the machine is shared.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from openai import OpenAI
from transformers.generation.streamers import BaseStreamer

import isthmus
from benchmarks.common.results import Results, repeated
from benchmarks.speed.foundation import bench_recipe
from isthmus.demo.assets import smollm2
from isthmus.engines.local import create_run, run_federation
from isthmus.engines.process import LISTENING
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo

CACHE = Path("build/demo")
PROMPT, ANSWER = 64, 64
AT_ONCE = 16
PAIRS = 9
WIDE_PAIRS = 5


class Times(BaseStreamer):
    """When ``generate``'s tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...

    @property
    def token(self) -> float:
        """Seconds a token after the first."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def main() -> None:
    results = Results("gateway", "make bench-gateway")
    with tempfile.TemporaryDirectory() as temporary:
        plain, served = (write_run(Path(temporary) / name) for name in ("plain", "served"))
        with isthmus.open(plain) as silo, gateway(served) as (client, process):
            ids = prompts(silo)
            measure_overhead(results, silo, client, ids[0], process)
            measure_many(results, silo, client, ids, process)
    print(f"written: {results.write()}")


def write_run(folder: Path) -> Path:
    """A run directory of SmolLM2 in which nothing trains."""
    nothing = {"train": {"rounds": 0, "evaluate": False}, "silo": [{"name": "bench"}]}
    recipe = Recipe.of(bench_recipe(smollm2(CACHE)).model_dump(exclude_unset=True) | nothing)
    run_federation(create_run(recipe, folder))
    return folder


@contextmanager
def gateway(run: Path) -> Iterator[tuple[OpenAI, psutil.Process]]:
    """A client of a gateway, and the gateway's process."""
    command = [sys.executable, "-m", "isthmus", "gateway", str(run), "--port", "0", "--conversations", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            assert line.startswith(LISTENING), line
            url = line.removeprefix(LISTENING).strip()
            yield OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600), psutil.Process(process.pid)
        finally:
            process.terminate()


def prompts(silo: Silo) -> list[list[int]]:
    """Token ids, ``PROMPT`` of each: made up, since only their number has an effect on the times."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(100, silo.model.config.vocab_size, (AT_ONCE, PROMPT), generator=draw).tolist()


def spent(process: psutil.Process) -> float:
    """Processor seconds of a process and its children so far."""
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


def measure_overhead(results: Results, silo: Silo, client: OpenAI, ids: list[int], process: psutil.Process) -> None:
    """Seconds a token, in the middle of an answer, of one request and of ``generate``."""
    ends = ending_bias(silo)
    here = psutil.Process()
    rounds = []
    for _ in range(PAIRS + 1):
        before = spent(here)
        plain = generated(silo, ids)
        own = spent(here) - before
        before = spent(process)
        streamed = asked(client, ids, ends)
        rounds.append((plain, streamed, own, spent(process) - before))
    rounds = rounds[1:]
    results.add("generate: a token", statistics.median(one[0] for one in rounds), "s")
    results.add("gateway: a token", statistics.median(one[1] for one in rounds), "s")
    ratios = [streamed / plain for plain, streamed, _, _ in rounds]
    repeated(results, "a token, gateway / generate", ratios, "ratio", at_most=1.05)
    ratios = [served / own for _, _, own, served in rounds]
    repeated(results, "processor time of an answer, gateway / generate", ratios, "ratio")


def measure_many(results: Results, silo: Silo, client: OpenAI, ids: list[list[int]], process: psutil.Process) -> None:
    """Tokens a second of sixteen requests at once, beside one."""
    ends, rates = ending_bias(silo), []
    for _ in range(WIDE_PAIRS + 1):
        one, own = rate(client, ids[:1], ends, process)
        many, wide = rate(client, ids, ends, process)
        rates.append((one, many, own, wide))
    rates = rates[1:]
    results.add("one request: tokens/s", statistics.median(one for one, *_ in rates), "tokens/s")
    results.add(f"{AT_ONCE} at once: tokens/s", statistics.median(many for _, many, *_ in rates), "tokens/s")
    ratios = [many / one for one, many, *_ in rates]
    repeated(results, f"tokens/s, {AT_ONCE} at once / one", ratios, "ratio", at_least=2.5)
    ratios = [own / wide for *_, own, wide in rates]
    repeated(results, f"processor time a token, one / {AT_ONCE} at once", ratios, "ratio")


def rate(client: OpenAI, ids: list[list[int]], ends: dict[str, int], process: psutil.Process) -> tuple[float, float]:
    """Tokens a second of these requests at once, their prompts' passes included, and processor seconds a token."""
    before, started = spent(process), time.perf_counter()
    with ThreadPoolExecutor(len(ids)) as threads:
        list(threads.map(lambda own: asked(client, own, ends), ids))
    tokens = len(ids) * ANSWER
    return tokens / (time.perf_counter() - started), (spent(process) - before) / tokens


def generated(silo: Silo, ids: list[int]) -> float:
    """Seconds a token of ``generate``, as ``isthmus generate`` calls it."""
    times, ids_1L = Times(), torch.tensor([ids])
    length: dict[str, Any] = {"min_new_tokens": ANSWER, "max_new_tokens": ANSWER, "do_sample": False}
    silo.model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), streamer=times, **length)
    return times.token


def asked(client: OpenAI, ids: list[int], ends: dict[str, int]) -> float:
    """Seconds a token of a stream."""
    times = []
    stream = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=ids,
        max_tokens=ANSWER,
        temperature=0,
        logit_bias=ends,
        stream=True,
        stream_options={"include_usage": True},
    )
    usage = None
    for chunk in stream:
        times.append(time.perf_counter())
        usage = chunk.usage
    assert usage is not None
    assert usage.completion_tokens == ANSWER
    return (times[-1] - times[0]) / (ANSWER - 1)


def ending_bias(silo: Silo) -> dict[str, int]:
    """Lets no answer end by itself."""
    known = silo.model.generation_config.eos_token_id
    ends = {*([known] if isinstance(known, int) else known), silo.tokenizer.eos_token_id}
    return {str(token): -100 for token in ends}


if __name__ == "__main__":
    main()
