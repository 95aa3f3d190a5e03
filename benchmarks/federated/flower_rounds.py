"""A round of isthmus on Flower beside one of Flower's own FedAvg; hundreds of silos in Flower's simulation.

``make bench-flower``. Both sides run over a SuperLink with TLS and node authentication and two SuperNodes on this
machine, with the same model, rows, batches and adapters, in turn. A round lasts from the end of one to the end of the
next, so that connecting does not count. FedAvg trains the whole model in each silo's process, which Flower starts anew
for a message; isthmus trains the model split, with a trunk on the same cores.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import psutil
import torch

from benchmarks.common.results import Results
from isthmus.demo.assets import smollm2
from isthmus.engines.process import LISTENING
from isthmus.storage.record import RunDirectory
from tests.conftest import write_rows
from tests.integration.flowers import SuperLink
from tests.integration.processes import rows_of, write_federation

FEDAVG = Path(__file__).parent / "fedavg"
SILOS = ("north", "south")
TEXT = "patient seen in clinic after surgery with mild pain and no fever for two days then home"
RECIPE = """
seed = 1
threads = {threads}
[model]
path = "{model}"
bottom = 2
top = 2
[lora]
rank = 8
alpha = 16.0
targets = ["q_proj", "v_proj"]
[train]
rounds = {rounds}
steps = {steps}
batch = {batch}
learning_rate = 1e-3
evaluate = false
[task]
prompt = "{{text}}"
answer = " {{label}}"
[boundary]
forward.noise = 0.0
gradient.noise = 0.0
update.noise = 0.0
[wire]
certificates = "{folder}/certificates"
[[silo]]
name = "north"
train = "north.jsonl"
[[silo]]
name = "south"
train = "south.jsonl"
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--silos", type=int, default=200, help="of the simulation; 0: none")
    chosen = parser.parse_args()
    results = Results("flower", "make bench-flower")
    with tempfile.TemporaryDirectory(prefix="isthmus-flower-") as folder:
        if chosen.pairs:
            compare(results, Path(folder), chosen.pairs, chosen.rounds, chosen.steps)
            results.write(keep=True)
        if chosen.silos:
            simulate(results, Path(folder), chosen.silos)
    results.write(keep=True)


def compare(results: Results, folder: Path, pairs: int, rounds: int, steps: int) -> None:
    """Rounds of both sides in turn."""
    model = smollm2(Path("build/demo")).resolve()
    draw = random.Random(1)
    for silo in SILOS:
        texts = [" ".join(draw.choices(TEXT.split(), k=60)) for _ in range(24)]
        write_rows(folder / f"{silo}.jsonl", [{"text": text, "label": text.split()[0]} for text in texts])
    settings = {"model": model, "rounds": rounds, "steps": steps, "batch": 4, "threads": 2, "folder": folder}
    (folder / "recipe.toml").write_text(RECIPE.format(**settings))
    own: list[float] = []
    flower: list[float] = []
    for number in range(pairs):
        own += isthmus_rounds(folder, folder / f"own-{number}", rounds)
        flower += fedavg_rounds(folder, folder / f"fedavg-{number}", settings)
        print(f"isthmus {own[-rounds + 1 :]}, FedAvg {flower[-rounds + 1 :]}", flush=True)
    mine, theirs = statistics.median(own), statistics.median(flower)
    results.add("a round of isthmus on Flower, two silos, SmolLM2-135M", mine, "s")
    results.add("a round of Flower's FedAvg, the same model and rows", theirs, "s")
    results.add("overhead of a round beside FedAvg's", 100 * (mine / theirs - 1), "%", at_most=5)


def isthmus_rounds(folder: Path, place: Path, rounds: int) -> list[float]:
    """Seconds of each round but the first, of a federation over Flower."""
    recipe = folder / "recipe.toml"
    command("certificates", recipe)
    command("flower", recipe, place / "app")
    with ExitStack() as stack:
        link = stack.enter_context(SuperLink(place / "flower"))
        at = ("--run-dir", place / "root", "--flower", place / "root.sock", "--address", "localhost:0")
        trunk = stack.enter_context(Party(place, "trunk", recipe, "--with-root", *at))
        for silo in SILOS:
            socket = place / f"{silo}.sock"
            at = ("--run-dir", place / silo, "--flower", socket, "--trunk", trunk.address)
            stack.enter_context(Party(place, "silo", recipe, silo, *at))
            link.node(link.key(silo), silo, socket)
        run = link.run(place / "app", "--run-config", f'root="{place}/root.sock"')
        assert run.process.wait(1800) == 0, run.output
    saved = [place / "root" / "root" / "rounds" / f"round-{number:04}.pt" for number in range(1, rounds + 1)]
    return between([one.stat().st_mtime for one in saved])


def fedavg_rounds(folder: Path, place: Path, settings: dict[str, object]) -> list[float]:
    """Seconds of each round but the first, of Flower's FedAvg."""
    times = place / "times"
    packages = Path(torch.__file__).parents[1]
    with SuperLink(place / "flower") as link:
        for silo in SILOS:
            link.node(link.key(silo), silo, place / "none", f'rows="{folder}/{silo}.jsonl"')
        words = {**settings, "packages": packages, "times": times}
        config = [f"{name}={json.dumps(str(words[name]))}" for name in ("packages", "model", "times")]
        config += [f"{name}={words[name]}" for name in ("rounds", "steps", "batch", "threads")]
        run = link.run(FEDAVG, "--run-config", " ".join(config))
        assert run.process.wait(1800) == 0, run.output
        assert times.exists(), run.output
    return between([float(line) for line in times.read_text().split()])


def simulate(results: Results, folder: Path, silos: int, rounds: int = 3) -> None:
    """Many tiny silos in Flower's simulation."""
    names = [f"silo-{number:03}" for number in range(silos)]
    place = folder / "many"
    place.mkdir()
    for name in names:
        write_rows(place / f"{name}.jsonl", rows_of(name, 4))
    train = {"rounds": rounds, "steps": 2, "evaluate": False}
    recipe = write_federation(place, silo=[{"name": name, "train": f"{name}.jsonl"} for name in names], train=train)
    command("flower", recipe, place / "app", "--simulation", "--run-dir", place / "run")
    with SuperLink(place / "flower", simulation=True) as link:
        started = time.perf_counter()
        run = link.run(place / "app", "--federation-config", f"num-supernodes={silos}")
        memory = 0
        while run.process.poll() is None:
            memory = max(memory, _memory("isthmus.engines.flower.simulated"))
            time.sleep(1)
        assert run.process.wait() == 0, run.output
        seconds = time.perf_counter() - started
    directory = RunDirectory(place / "run").role("root").path
    saved = [directory / "rounds" / f"round-{number:04}.pt" for number in range(1, rounds + 1)]
    lasted = statistics.median(between([one.stat().st_mtime for one in saved]))
    results.add(f"{silos} silos in Flower's simulation: {rounds} rounds with starting", seconds, "s")
    results.add(f"{silos} silos in Flower's simulation: a round", lasted, "s")
    results.add(f"{silos} silos in Flower's simulation: memory of trunk, root and silos", memory / 2**20, "MiB")


def between(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "isthmus", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


class Party:
    """A role as a process while the block runs."""

    def __init__(self, place: Path, *words: object) -> None:
        self._output = place / f"{words[0]}-{words[2]}.log"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "isthmus", *map(str, words)], stdout=output, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Party:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    @property
    def address(self) -> str:
        while True:
            for line in self._output.read_text().splitlines():
                if line.startswith(LISTENING):
                    return line.removeprefix(LISTENING)
            assert self._process.poll() is None, self._output.read_text()
            time.sleep(0.1)


def _memory(module: str) -> int:
    """Bytes of the process of this module."""
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        if module in (process.info["cmdline"] or ()):
            return int(process.info["memory_info"].rss)
    return 0


if __name__ == "__main__":
    main()
