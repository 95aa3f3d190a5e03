"""Continuous batching: tokens a second of many inference sessions at once against one.

``make bench-sessions``. The trunk is a process of its own. Silos are on other machines in earnest; here they are
threads that send prepared hidden states, and in a second measurement threads that generate with real ends.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.common.bare import made_up
from benchmarks.common.results import Results
from benchmarks.speed.foundation import bench_recipe
from isthmus.demo.assets import smollm2
from isthmus.engines.local import at_address, local_recipe, serving
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, join
from isthmus.silo.remote import RemoteSession, RemoteTrunk
from isthmus.storage.record import RunDirectory

CACHE = Path("build/demo")
PROMPT, ANSWER, REPEATS = 128, 48, 5
COUNTS = (1, 8, 32)
GOALS = {8: 3.0}
"""How often one session's tokens a second so many have together, by the ratio of medians."""
WIDTH = 576


def main() -> None:
    results = Results("sessions", "make bench-sessions")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        path = Path(temporary) / "run"
        run = RunDirectory.create(path, local_recipe(bench_recipe(smollm2(CACHE)), path))
        _, address = stack.enter_context(serving(run))
        silo = join(at_address(run.recipe(), address), "bench")
        stack.callback(silo.close)
        rates = measure(COUNTS, lambda count: trunk_rate(silo.trunk, count))
        report(results, "trunk", rates, GOALS)
        report(results, "whole model, ends on the same cores", measure((1, 8), lambda n: model_rate(silo, n)))
        results.add("prompt of 2048 beside a session: longest wait for a token", longest_wait(silo.trunk), "s")
    print(f"written: {results.write()}")


def measure(counts: tuple[int, ...], rate: Callable[[int], float], repeats: int = REPEATS) -> dict[int, list[float]]:
    """Tokens a second for each number of sessions, in turn, the first repeat left out."""
    rounds = [{count: rate(count) for count in counts} for _ in range(repeats + 1)][1:]
    return {count: [one[count] for one in rounds] for count in counts}


def report(results: Results, what: str, rates: dict[int, list[float]], goals: Mapping[int, float] = {}) -> None:
    """Rates, and ratios to one session: the median of the repeats' ratios, their spread, and the ratio of medians."""
    for count, values in rates.items():
        results.add(f"{what}: {count} sessions", statistics.median(values), "tokens/s")
        results.add(f"{what}: {count} sessions, lowest repeat", min(values), "tokens/s")
        results.add(f"{what}: {count} sessions, highest repeat", max(values), "tokens/s")
    for count in (count for count in rates if count > 1):
        ratios = [many / one for many, one in zip(rates[count], rates[1], strict=True)]
        medians = statistics.median(rates[count]) / statistics.median(rates[1])
        name = f"{what}: {count} sessions against 1"
        results.add(name, statistics.median(ratios), "ratio")
        results.add(f"{name}, lowest repeat", min(ratios), "ratio")
        results.add(f"{name}, highest repeat", max(ratios), "ratio")
        results.add(f"{name}, ratio of medians", medians, "ratio", at_least=goals.get(count))


def trunk_rate(trunk: RemoteTrunk, count: int) -> float:
    """Tokens a second of so many sessions that all decode at once."""
    sessions = prompted(trunk, count, PROMPT, WIDTH)
    seconds = decode(sessions, ANSWER, WIDTH)
    for session in sessions:
        session.close()
    return count * ANSWER / seconds


def prompted(trunk: RemoteTrunk, count: int, prompt: int, width: int) -> list[RemoteSession]:
    """So many sessions after prompts of about this length."""
    sessions = [trunk.open_session() for _ in range(count)]
    for number, session in enumerate(sessions):
        session.step(made_up(torch.randn(prompt + number, width), [prompt + number]))
    return sessions


def decode(sessions: list[RemoteSession], answer: int, width: int) -> float:
    """Seconds until each of these has decoded so many tokens, all at once."""
    tokens = [made_up(torch.randn(1, width), [1]) for _ in sessions]

    def decode_one(number: int) -> None:
        for _ in range(answer):
            sessions[number].step(tokens[number])

    return at_once(decode_one, len(sessions))


def model_rate(silo: Silo, count: int) -> float:
    """The same with ``generate``: bottom and top compute here, each session for itself."""
    ids = torch.randint(100, 40_000, (count, PROMPT))

    def generate(number: int) -> None:
        settings = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 2}
        silo.model.generate(ids[number : number + 1], **settings)

    return count * ANSWER / at_once(generate, count)


def longest_wait(trunk: RemoteTrunk) -> float:
    """Of one session's tokens, while another's long prompt is computed."""
    session, long = trunk.open_session(), trunk.open_session()
    session.step(made_up(torch.randn(PROMPT, WIDTH), [PROMPT]))
    waits = []
    with ThreadPoolExecutor(1) as thread:
        prompt = thread.submit(long.step, made_up(torch.randn(2048, WIDTH), [2048]))
        while not prompt.done():
            started = time.perf_counter()
            session.step(made_up(torch.randn(1, WIDTH), [1]))
            waits.append(time.perf_counter() - started)
        prompt.result()
    return max(waits)


def at_once(work: Callable[[int], None], count: int) -> float:
    """Seconds until all of so many threads have done their work. One that fails ends the benchmark."""
    with ThreadPoolExecutor(count) as threads:
        started = time.perf_counter()
        list(threads.map(work, range(count)))
        return time.perf_counter() - started


def silos_recipe(recipe: Recipe, names: tuple[str, ...]) -> Recipe:
    """The same federation with these silos."""
    party = recipe.silo[0]
    return recipe.model_copy(update={"silo": tuple(party.model_copy(update={"name": name}) for name in names)})


if __name__ == "__main__":
    main()
