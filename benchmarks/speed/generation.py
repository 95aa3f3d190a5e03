"""Generation after 512 tokens: caches on both sides against the published mode without any. ``make bench-generation``.

All modes cross in fp16 and meet the same trunk process over mTLS, in turn; they differ in what crosses and is computed.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.common.proxy import CountingProxy
from benchmarks.common.results import Results
from benchmarks.speed.foundation import bench_recipe
from benchmarks.speed.published import WholeSequences
from isthmus.demo.assets import hutto, smollm2
from isthmus.engines.local import at_address, local_recipe, serving
from isthmus.model.split import SplitForCausalLM
from isthmus.recipe import CodecSection, Recipe
from isthmus.silo.join import Silo, join
from isthmus.storage.record import RunDirectory

CACHE = Path("build/demo")
PROMPT, ANSWER, SHORT = 512, 64, 6
REPEATS, LOOKED_UP = 5, 4
LINE_DELAY, LINE_BANDWIDTH, LINE_REPEATS = 0.010, 12.5e6, 3
"""Seconds one way and bytes a second: 20 ms a round trip and 100 Mbit/s, for the second part."""
CACHED, LOOKUP, PUBLISHED, BARE = "caches", "caches and prompt lookup", "published", "no cache"
"""``BARE`` is the published mode without masks and with the head on the last position only: the least that a mode
without caches can do."""
GOALS = {CACHED: 20.0, LOOKUP: 25.0}
"""How often the published mode's tokens a second, on a processor."""


@dataclass
class Clock(BaseStreamer):
    """Notes seconds and bytes as ``generate`` starts and at each of its tokens."""

    proxy: CountingProxy | None = None
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(value.numel())
        if self.proxy is not None:
            self.up.append(self.proxy.up)
            self.down.append(self.proxy.down)

    def end(self) -> None: ...

    @property
    def prompt_pass(self) -> float:
        """Seconds to the first token (or, with lookup, tokens)."""
        return self.times[1] - self.times[0]

    @property
    def token(self) -> float:
        """Seconds a token after that."""
        return (self.times[-1] - self.times[1]) / sum(self.tokens[2:])

    @property
    def answer(self) -> float:
        """Seconds for the whole answer, the prompt included."""
        return self.times[-1] - self.times[0]


def main() -> None:
    results = Results("generation", "make bench-generation")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "run"
        run = RunDirectory.create(path, local_recipe(fp16_recipe(smollm2(CACHE)), path))
        with serving(run) as (_, address):
            silo = join(at_address(run.recipe(), address), "bench")
            ids = prompt_of(silo)
            measure_seconds(results, modes_of(silo.model, ids))
            silo.close()
            proxy = CountingProxy(address, LINE_DELAY, LINE_BANDWIDTH)
            silo = join(at_address(run.recipe(), proxy.address), "bench")
            measure_line(results, modes_of(silo.model, ids, proxy))
            silo.close()
            proxy.close()
    print(f"written: {results.write()}")


def fp16_recipe(folder: Path) -> Recipe:
    recipe = bench_recipe(folder)
    codec = CodecSection(**dict.fromkeys(CodecSection.model_fields, "fp16"))
    return recipe.model_copy(update={"boundary": recipe.boundary.model_copy(update={"codec": codec})})


Modes = dict[str, Callable[[int], Clock]]


def prompt_of(silo: Silo) -> torch.Tensor:
    """A prompt of newspaper editorials, ``[1, PROMPT]``."""
    rows = hutto(CACHE, rows=64, held_out=60, seed=1)["editorials"].train.read_text().splitlines()
    text = " ".join(json.loads(row)["text"] for row in rows)
    ids: torch.Tensor = silo.tokenizer(text, return_tensors="pt")["input_ids"][:, :PROMPT]
    assert ids.shape[1] == PROMPT
    return ids


def modes_of(model: SplitForCausalLM, ids: torch.Tensor, proxy: CountingProxy | None = None) -> Modes:
    """By name, what generates so many tokens after this prompt, and tells when they came."""
    remote = model.trunk

    def mode(trunk: torch.nn.Module, **how: Any) -> Callable[[int], Clock]:
        def generate(count: int) -> Clock:
            model.trunk, clock = trunk, Clock(proxy)
            length = {"min_new_tokens": count, "max_new_tokens": count}
            model.generate(ids, streamer=clock, do_sample=False, pad_token_id=2, **length, **how)
            return clock

        return generate

    return {
        CACHED: mode(remote, use_cache=True),
        LOOKUP: mode(remote, use_cache=True, prompt_lookup_num_tokens=LOOKED_UP),
        PUBLISHED: mode(WholeSequences(remote, masked=True), use_cache=False, logits_to_keep=0),
        BARE: mode(WholeSequences(remote, masked=False), use_cache=False),
    }


def measure_seconds(
    results: Results,
    modes: Modes,
    goals: Mapping[str, float] = GOALS,
    *,
    answer: int = ANSWER,
    short: int = SHORT,
    repeats: int = REPEATS,
) -> None:
    """All modes in turn; at last one whole answer of each, whose prompt pass is part of it."""
    counts = {CACHED: answer, LOOKUP: answer, PUBLISHED: short, BARE: short}
    for generate in modes.values():
        generate(2)
    rounds = [{name: generate(counts[name]) for name, generate in modes.items()} for _ in range(repeats)]
    for name in modes:
        report_spread(results, f"{name}: prompt pass", [one[name].prompt_pass for one in rounds], "s")
        report_spread(results, f"{name}: a token", [one[name].token for one in rounds], "s")
    for ours, name in ((CACHED, PUBLISHED), (LOOKUP, PUBLISHED), (CACHED, BARE)):
        if ours in modes:
            ratios = [one[name].token / one[ours].token for one in rounds]
            goal = goals[ours] if name == PUBLISHED else None
            report_spread(results, f"tokens/s after the prompt, {ours} / {name}", ratios, "ratio", at_least=goal)
    answers = {name: modes[name](answer).answer for name in modes if name != BARE}
    for name, seconds in answers.items():
        results.add(f"{name}: answer of {answer} tokens with its prompt pass", seconds, "s")
    ratio = answers[PUBLISHED] / answers[CACHED]
    results.add(f"tokens/s over a whole answer, {CACHED} / {PUBLISHED}", ratio, "ratio")


def report_spread(
    results: Results, measure: str, values: list[float], unit: str, *, at_least: float | None = None
) -> None:
    results.add(f"{measure}, median of {len(values)}", statistics.median(values), unit, at_least=at_least)
    results.add(f"{measure}, lowest", min(values), unit)
    results.add(f"{measure}, highest", max(values), unit)


def measure_line(results: Results, modes: Modes) -> None:
    """Over an emulated line: what passes through the socket, and what the modes' ratio is there."""
    modes = {name: generate for name, generate in modes.items() if name != LOOKUP}
    rounds = [{name: generate(SHORT) for name, generate in modes.items()} for _ in range(LINE_REPEATS)]
    for name, clock in rounds[0].items():
        for way, counts in (("up", clock.up), ("down", clock.down)):
            results.add(f"{name}: bytes {way} for the prompt", (counts[1] - counts[0]) / 1024, "KiB")
            results.add(f"{name}: bytes {way} a token", (counts[-1] - counts[1]) / sum(clock.tokens[2:]) / 1024, "KiB")
    line = f"over {LINE_BANDWIDTH * 8 / 1e6:.0f} Mbit/s and {LINE_DELAY * 2e3:.0f} ms a round trip"
    for name in modes:
        report_spread(results, f"{name}: a token {line}", [one[name].token for one in rounds], "s")
    for name in (PUBLISHED, BARE):
        ratios = [one[name].token / one[CACHED].token for one in rounds]
        report_spread(results, f"tokens/s {line}, {CACHED} / {name}", ratios, "ratio")


if __name__ == "__main__":
    main()
