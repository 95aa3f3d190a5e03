"""Fifty generations, in each of which the trunk is killed by SIGKILL at a random moment: it is started again, or a
replica goes on.

``make bench-replay``. Every answer must be, token for token, the one that an undisturbed trunk gives.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common.ports import free_port
from benchmarks.common.results import Results
from benchmarks.speed.foundation import bench_recipe
from isthmus.demo.assets import smollm2
from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import START_SECONDS, at_address, at_trunks, local_recipe
from isthmus.engines.process import RoleProcess
from isthmus.privacy.noise import SeededNoise
from isthmus.silo.join import Silo, join
from isthmus.storage.record import RunDirectory
from isthmus.wire.client import GrpcChannel

CACHE = Path("build/demo")
GENERATIONS, PROMPT, ANSWER = 50, 64, 32
NOISE_SEED = 7


def main() -> None:
    results = Results("replay", "make bench-replay")
    results.add("generations", GENERATIONS, "generations")
    with tempfile.TemporaryDirectory() as temporary:
        run = served_run(Path(temporary) / "run")
        measure_restarts(results, run)
        measure_replicas(results, run)
    print(f"written: {results.write()}")


def measure_restarts(results: Results, run: RunDirectory) -> None:
    """One trunk, which comes back at the same address."""
    trunk = Trunk(run)
    silo = join(at_address(run.recipe(), trunk.address), "bench")

    def kill() -> None:
        trunk.kill()
        trunk.start()

    measure(results, silo, "trunk", lambda: kill, lambda: None)
    trunk.kill()


def measure_replicas(results: Results, run: RunDirectory) -> None:
    """Two trunks of one run; the one that the silo has is killed, and is back before the next generation."""
    trunks = {one.address: one for one in (Trunk(run, "--replica"), Trunk(run, "--replica"))}
    silo = join(at_trunks(run.recipe(), ",".join(trunks)), "bench")
    killed: list[Trunk] = []

    def killing() -> Callable[[], None]:
        assert isinstance(silo.trunk.channel, GrpcChannel)
        killed.append(trunks[silo.trunk.channel.address])
        return killed[-1].kill

    measure(results, silo, "replica", killing, lambda: killed[-1].start())
    for trunk in trunks.values():
        trunk.kill()


def measure(
    results: Results, silo: Silo, what: str, killing: Callable[[], Callable[[], None]], restore: Callable[[], None]
) -> None:
    """Generations in each of which something is killed.

    Args:
        killing: gives what kills it; called before each generation.
        restore: called after each.
    """
    draw = random.Random(0)
    expected, undisturbed = answer(silo)
    same, times = 0, []
    for _ in range(GENERATIONS):
        killer = threading.Timer(draw.uniform(0, 0.9 * undisturbed), killing())
        killer.start()
        tokens, seconds = answer(silo)
        killer.join()
        restore()
        same += torch.equal(tokens, expected)
        times.append(seconds)
    silo.close()
    results.add(f"token-identical after a killed {what}", same, "generations", at_least=GENERATIONS)
    results.add(f"generation, undisturbed{' replica' if what == 'replica' else ''}", undisturbed, "s")
    results.add(f"generation with a killed {what}, median", statistics.median(times), "s")
    results.add(f"generation with a killed {what}, longest", max(times), "s")


def answer(silo: Silo) -> tuple[torch.Tensor, float]:
    """Greedy tokens and seconds; the noise is drawn from one seed, so that answers can be compared."""
    silo.boundary._noise = SeededNoise(torch.Generator().manual_seed(NOISE_SEED))
    ids = torch.arange(100, 100 + PROMPT).unsqueeze(0)
    started = time.perf_counter()
    tokens = silo.model.generate(ids, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=2)
    return tokens, time.perf_counter() - started


def served_run(path: Path) -> RunDirectory:
    """A folder that trunks serve, without rounds."""
    recipe = bench_recipe(smollm2(CACHE))
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"rounds": 0})})
    run = RunDirectory.create(path, local_recipe(recipe, path))
    make_certificates(run.recipe(), Path(run.recipe().wire.certificates))
    run.role("trunk").path.mkdir()
    return run


class Trunk:
    """A trunk process that can be killed and comes back at the same address."""

    def __init__(self, run: RunDirectory, *arguments: str) -> None:
        self.address = f"localhost:{free_port()}"
        self._run, self._arguments = run, ["trunk", str(run.path), *arguments, "--address", self.address]
        self.start()

    def start(self) -> None:
        log = self._run.path / "logs" / f"{self.address}.log"
        self._process = RoleProcess("the trunk", self._arguments, log)
        self._process.wait_listening(START_SECONDS)

    def kill(self) -> None:
        self._process.end(0.0)


if __name__ == "__main__":
    main()
