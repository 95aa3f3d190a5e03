"""``python -m benchmarks.federated.tables [--table NAME ...] [--tasks NAME ...] [--seeds N] [--model FOLDER]
[--device DEVICE] [--report]``: measure the cells that are missing, and write what all cells say.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common.results import DEVICE, Results
from benchmarks.federated.tables import cuts, optimizers, parallel, quality
from benchmarks.federated.tables.sets import SOURCES, TASKS
from isthmus.demo.assets import smollm2

SEEDS = 3
TABLES = ("quality", "cuts", "parallel", "optimizers")


def main() -> None:
    asked = arguments().parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    model = asked.model or smollm2(Path("build/demo"))
    setting = quality.Setting(model.resolve(), asked.device, tuple(range(asked.seeds)))
    # cells of more seeds than are asked for now count, too
    every = replace(setting, seeds=tuple(range(max(SEEDS, asked.seeds))))
    results = Results("tables", "make bench-tables")
    if "quality" in asked.table:
        if not asked.report:
            quality.run(setting, asked.tasks, asked.arms)
        quality.report(results, every, asked.tasks)
    if "cuts" in asked.table:
        if not asked.report:
            cuts.run(setting)
        cuts.report(results, every)
    if "parallel" in asked.table:
        if not asked.report:
            parallel.run(setting)
        parallel.report(results, setting)
    if "optimizers" in asked.table:
        if not asked.report:
            optimizers.run(setting.seeds)
        optimizers.report(results, every.seeds)
    print(f"written: {results.write(keep=True)}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federated.tables")
    parser.add_argument("--table", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=tuple(TASKS))
    parser.add_argument("--arms", nargs="+", choices=quality.ARMS, default=quality.ARMS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--model", type=Path, help="folder of a model; left out: SmolLM2-135M-instruct")
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    return parser


if __name__ == "__main__":
    main()
