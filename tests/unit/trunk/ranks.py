"""Ranks of a trunk as real processes that gloo connects: this one is rank 0, the others follow it.

The others are ``python -m tests.unit.trunk.ranks``. They load the model of the recipe that the file ``recipe`` has just
then.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from isthmus.errors import RankLostError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut
from isthmus.model.device import CPU
from isthmus.model.share import BlockShare
from isthmus.recipe import Recipe
from isthmus.trunk.ranks import AnswersOrders, Ranks, follow
from isthmus.trunk.stage import load_stage

ROOT = Path(__file__).parents[3]
WAIT = 120.0


class Others:
    """The other ranks' processes, and what they load."""

    def __init__(self, count: int, folder: Path) -> None:
        self._recipe = folder / "recipe"
        store, ranks = folder / "store", range(1, count)
        command = [sys.executable, "-m", "tests.unit.trunk.ranks"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
        self.processes = [
            psutil.Popen([*command, str(rank), str(count), str(store), str(self._recipe)], cwd=ROOT, env=environment)
            for rank in ranks
        ]
        connect(0, count, store)
        self.ranks = Ranks(count)

    def use(self, recipe: Recipe) -> Ranks:
        """Have all ranks load this recipe's model for the next trunk."""
        self._recipe.write_text(recipe.model_dump_json(exclude_none=True))
        return self.ranks


@contextmanager
def started(count: int, folder: Path) -> Iterator[Others]:
    """So many ranks, this one included, while the block runs; afterwards none is left."""
    others = Others(count, folder)
    try:
        yield others
    finally:
        others.ranks.end()
        dist.destroy_process_group()
        for process in others.processes:
            if _missed(others.ranks) and process.is_running():  # torchrun does so
                process.kill()
            process.wait(WAIT)


def _missed(ranks: Ranks) -> bool:
    try:
        ranks.check()
    except RankLostError:
        return True
    return False


def connect(rank: int, count: int, store: Path) -> None:
    wait = timedelta(seconds=WAIT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=wait)


def main() -> None:
    """One of the other ranks."""
    rank, count, store, path = sys.argv[1:]
    torch.set_num_threads(1)
    share = BlockShare(int(rank), int(count))
    connect(share.rank, share.ranks, Path(store))

    def load(cut: Cut) -> AnswersOrders:
        recipe = Recipe.of(json.loads(Path(path).read_text()))
        return load_stage(Checkpoint(recipe.model.path), recipe, CPU, share, cut).answer

    try:
        follow(load, CPU)
    except RankLostError as lost:
        sys.exit(str(lost))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
