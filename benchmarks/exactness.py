"""What a sequence gets, whoever shares its pass: random mixes at a trunk against each sequence alone.

``make bench-exactness``. The mixes are those of ``tests/oracle``, with tiny models; 64 bits tell rounding from error.
"""

from __future__ import annotations

import os
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.common.results import Results
from tests.oracle.mixes import TEXT_FAMILIES, TOLERANCE, World
from tests.oracle.ropes import OWN, ROPES, save_roped_model

MIXES = 1000
"""In all, in equal shares for the kinds of rope; as many again for the families."""
UNIT = "10⁻⁹ of the largest value"
WORKERS = len(os.sched_getaffinity(0))
KINDS = [
    *(("llama", kind) for kind in ROPES),
    ("phi3", "longrope"),
    ("gemma3_text", "dynamic"),
    ("olmo3", "longrope"),
]


def main() -> None:
    logging.disable_progress_bar()
    results = Results("exactness", "make bench-exactness")
    measure(results, "rope kinds × pass mixes", KINDS)
    measure(results, "families × pass mixes", [(family, OWN) for family in TEXT_FAMILIES])
    print(f"written: {results.write(keep=True)}")


def measure(results: Results, what: str, cases: list[tuple[str, str]], mixes: int = MIXES) -> None:
    """Failures and the largest distance over these cases, which share the mixes evenly."""
    with ProcessPoolExecutor(WORKERS, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        families, kinds = zip(*cases, strict=True)
        found = dict(zip(cases, pool.map(distances, families, kinds, repeat(-(-mixes // len(cases)))), strict=True))
    every = [far for distances in found.values() for far in distances]
    results.add(what, len(every), "mixes", at_least=mixes)
    failures = sum(far > TOLERANCE for far in every)
    results.add(f"{what}, not equal to the sequence alone", failures, "mixes", at_most=0)
    for (family, kind), distances_of_case in found.items():
        name = family if kind == OWN else f"{family} with {kind}"
        limit = TOLERANCE * 1e9
        results.add(f"largest distance, {name}", max(distances_of_case) * 1e9, UNIT, at_most=limit)


def distances(family: str, kind: str, mixes: int) -> list[float]:
    """The largest distance in each of these mixes from what the sequences give alone."""
    with tempfile.TemporaryDirectory() as folder:
        model, trunk = Path(folder) / "model", Path(folder) / "trunk"
        world = World(save_roped_model(family, kind, model), family, trunk)
        try:
            return [world.farthest(random.Random(f"{family} {kind} {seed}")) for seed in range(mixes)]
        finally:
            world.close()


if __name__ == "__main__":
    main()
