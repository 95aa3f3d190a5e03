"""Fifty generations, in each of which the trunk is killed by SIGKILL at a random moment and started again.

``make bench-replay``. Every answer must be, token for token, the one that an undisturbed trunk gives.
"""

from __future__ import annotations

import random
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.common.results import Results
from benchmarks.speed.foundation import bench_recipe
from isthmus.demo.assets import smollm2
from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import START_SECONDS, at_address, local_recipe
from isthmus.engines.process import RoleProcess
from isthmus.privacy.noise import SeededNoise
from isthmus.silo.join import Silo, join
from isthmus.storage.record import RunDirectory

CACHE = Path("build/demo")
GENERATIONS, PROMPT, ANSWER = 50, 64, 32
NOISE_SEED = 7


def main() -> None:
    results = Results("replay", "make bench-replay")
    with tempfile.TemporaryDirectory() as temporary:
        trunk = Trunk(Path(temporary) / "run")
        silo = join(at_address(trunk.run.recipe(), trunk.address), "bench")
        draw = random.Random(0)
        expected, undisturbed = answer(silo)
        same, times = 0, []
        for _ in range(GENERATIONS):
            killer = threading.Thread(target=trunk.kill_and_start, args=(draw.uniform(0, 0.9 * undisturbed),))
            killer.start()
            tokens, seconds = answer(silo)
            killer.join()
            same += torch.equal(tokens, expected)
            times.append(seconds)
        silo.close()
        trunk.stop()
    results.add("generations", GENERATIONS, "generations")
    results.add("token-identical after a killed trunk", same, "generations", at_least=GENERATIONS)
    results.add("generation, undisturbed", undisturbed, "s")
    results.add("generation with a killed trunk, median", statistics.median(times), "s")
    results.add("generation with a killed trunk, longest", max(times), "s")
    print(f"written: {results.write()}")


def answer(silo: Silo) -> tuple[torch.Tensor, float]:
    """Greedy tokens and seconds; the noise is drawn from one seed, so that answers can be compared."""
    silo.boundary._noise = SeededNoise(torch.Generator().manual_seed(NOISE_SEED))
    ids = torch.arange(100, 100 + PROMPT).unsqueeze(0)
    started = time.perf_counter()
    tokens = silo.model.generate(ids, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=2)
    return tokens, time.perf_counter() - started


class Trunk:
    """A trunk process that can be killed and comes back at the same address."""

    def __init__(self, path: Path) -> None:
        self.run = RunDirectory.create(path, local_recipe(bench_recipe(smollm2(CACHE)), path))
        make_certificates(self.run.recipe(), Path(self.run.recipe().wire.certificates))
        self.address = f"localhost:{free_port()}"
        self.start()

    def start(self) -> None:
        arguments = ["trunk", str(self.run.recipe_path), "--address", self.address, "--run-dir", str(self.run.path)]
        self._process = RoleProcess("the trunk", arguments, self.run.path / "logs" / "trunk.log")
        self._process.wait_listening(START_SECONDS)

    def kill_and_start(self, after: float) -> None:
        time.sleep(after)
        self._process.end(0.0)
        self.start()

    def stop(self) -> None:
        self._process.end(0.0)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


if __name__ == "__main__":
    main()
