"""What each cut costs and leaks, and what the published noise hides behind the first blocks.

``make bench-cuts``. SmolLM2-135M on hutto sentiment, nothing trained. Each cut is measured in a fresh process, as
``isthmus cut`` does. Noise is given as published, and in the published proportion to the hidden states' mean magnitude.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common.results import Results
from benchmarks.common.rows import SHARED, Rows, read, write_lines
from isthmus.audit.capture import capture_pairs
from isthmus.audit.cut_probe import AttackRows, TimedService, probe_cut, probed_silo
from isthmus.audit.target import Target
from isthmus.demo.assets import smollm2
from isthmus.engines.cuts import CUTS, CutFigures
from isthmus.engines.fresh import in_fresh_process
from isthmus.engines.zero_trunk import ZeroTrunk
from isthmus.recipe import Recipe
from isthmus.silo.join import load_data

CACHE = Path("build/demo")
ROWS, LONGEST = 300, 220
NOISES = (0.0, 0.01, 0.02, 0.05, 0.1)
"""The published noise on a coordinate (FedSEA-LLaMA, arXiv 2505.15683)."""
PUBLISHED_MAGNITUDE = 0.02
"""Mean magnitude of a coordinate of the hidden states there."""
BOTTOMS = (1, 2, 3)
WEAK = 0.9
"""Where the linear inverter recovers less, the attack that runs bottom itself is tried, too."""
MATCHED = 8
"""Rows for that attack, which takes some seconds a row."""


def main() -> None:
    results = Results("cuts", "make bench-cuts")
    parts = sys.argv[1:] or ["cuts", "noise"]
    with tempfile.TemporaryDirectory() as temporary:
        rows = write_rows(Path(temporary) / "rows.jsonl")
        if "cuts" in parts:
            for bottom, top in CUTS:
                measure_cut(results, recipe_of(rows, 0.02).with_cut(bottom, top))
                results.write(keep=True)
        if "noise" in parts:
            for bottom in BOTTOMS:
                measure_noise(results, rows, bottom)
                results.write(keep=True)
    print(f"written: {results.write(keep=True)}")


def recipe_of(rows: Path, noise: float) -> Recipe:
    """The published setting: Gaussian noise on the hidden states, without a clip."""
    return Recipe.of(
        {
            "threads": 1,
            "model": {"path": str(smollm2(CACHE).resolve())},
            "task": {"prompt": "{text}\nSentiment:", "answer": " {label}", "choices": [" positive", " negative"]},
            "train": {"evaluate": False, "batch": 4},
            "boundary": {"forward": {"noise": noise}, "gradient": {"noise": 0.0}, "update": {"noise": 0.0}},
            "silo": [{"name": "north", "train": str(rows)}],
        }
    )


def write_rows(path: Path) -> Path:
    """Texts with a clear sentiment, spread over all four kinds of text."""
    clear: Rows = [
        {"text": one["text"], "label": "positive" if one["score"] > 0 else "negative"}
        for one in read(SHARED / "hutto_sentiment" / "all.jsonl")
        if abs(one["score"]) >= 0.5 and len(one["text"]) <= LONGEST
    ]
    write_lines(path, [json.dumps(one) for one in clear[:: len(clear) // ROWS][:ROWS]])
    return path


def measure_cut(results: Results, recipe: Recipe) -> None:
    """One cut's figures, as ``isthmus cut`` measures them."""
    cut = f"cut ({recipe.model.bottom}, {recipe.model.top})"
    *_, found = in_fresh_process(probe_cut, recipe, "north", None, ["linear"], True)
    assert found.memory is not None
    for name, value, unit in (
        ("silo's peak memory", found.memory / 1e6, "MB"),
        ("training step, silo", found.silo_step, "s"),
        ("training step, trunk", found.trunk_step, "s"),
        ("step up", found.up / 1e6, "MB"),
        ("step down", found.down / 1e6, "MB"),
        ("decoded token, silo", 1e3 * found.silo_token, "ms"),
        ("decoded token, trunk", 1e3 * found.trunk_token, "ms"),
        ("tokens recovered, noise 0.02", found.leakage, "share"),
        ("tokens recovered, noise 0.02, lower bound of 95 %", found.leakage_interval[0], "share"),
    ):
        results.add(f"{cut}: {name}", value, unit)


def measure_noise(results: Results, rows: Path, bottom: int) -> None:
    """Tokens recovered behind so many blocks, by noise."""
    from isthmus.audit.cut_leakage import measured_leakage  # fresh processes read this file, and count what it imports

    clean = recipe_of(rows, 0.0).with_cut(bottom, 1)
    own = own_rows(clean)
    magnitude = mean_magnitude(clean, own)
    results.add(f"bottom {bottom}: mean magnitude of a coordinate", magnitude, "")
    for name, noise in noises(magnitude):
        recipe = recipe_of(rows, noise).with_cut(bottom, 1)
        found = measured_leakage(CutFigures(bottom, 1), recipe, "north", own, ["linear"])
        results.add(f"bottom {bottom}, {name}: tokens recovered (linear)", found.leakage or 0.0, "share")
        if (found.leakage or 0.0) < WEAK:
            some = replace(own, attacked=own.attacked[:MATCHED])
            found = measured_leakage(found, recipe, "north", some, ["matching"])
            results.add(f"bottom {bottom}, {name}: tokens recovered (matching)", found.leakage or 0.0, "share")


def own_rows(recipe: Recipe) -> AttackRows:
    """The rows that are attacked, and those that the attacker knows."""
    with probed_silo(recipe, "north", TimedService(ZeroTrunk(recipe))) as (silo, _, _):
        return AttackRows.drawn(recipe, "north", load_data(recipe, "north", silo), None)


def mean_magnitude(clean: Recipe, own: AttackRows) -> float:
    """Of a coordinate of what crosses of these rows without noise."""
    crossed = [pair.crossing.hidden_LD for pair in capture_pairs(Target(clean), "north", own.attacked)]
    return float(torch.cat(crossed).abs().mean())


def noises(magnitude: float) -> Iterator[tuple[str, float]]:
    """Names and noises: as published, then in proportion to this mean magnitude."""
    for noise in NOISES:
        yield f"noise {noise:g}", noise
    for noise in NOISES[1:]:
        yield f"noise {noise / PUBLISHED_MAGNITUDE:g} × mean magnitude", noise / PUBLISHED_MAGNITUDE * magnitude


if __name__ == "__main__":
    main()
