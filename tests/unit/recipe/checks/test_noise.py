"""Noise of a round's sum: what it needs, what goes together with it, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.recipe import ClipSection, NoiseSection, Recipe
from tests.unit.recipe.refusals import OUT, Case, Changes, assert_mended, changed, least, name_of

SILOS = "abcdefgh"
F = "federation"
SUM: Changes = {
    f"{F}.secure": {"masks": True},
    f"{F}.weights": "equal",
    f"{F}.noise": {"multiplier": 1.0},
    f"{F}.clip": {"norm": 0.5},
}
AT_ROOT: Changes = SUM | {f"{F}.noise": {"multiplier": 1.0, "where": "root"}}
OPEN: Changes = AT_ROOT | {f"{F}.secure": {}}
EDGES = [
    {"name": name, "address": "localhost:1", "silos": list(silos), "minimum": minimum}
    for name, silos, minimum in (("left", "abcd", 4), ("right", "efgh", 3))
]
DP = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 1.0, "delta": 1e-5}


def test_noise_and_clip_as_asked_for(tmp_path: Path) -> None:
    asked = SUM | {f"{F}.noise": {"epsilon": 8.0, "colluding": 2}, f"{F}.clip": {"norm": 0.5, "quantile": 0.7}}
    made = Recipe.of(changed(least(SILOS), asked))
    assert made.federation.noise == NoiseSection(where="silos", epsilon=8.0, colluding=2)
    assert made.federation.clip == ClipSection(norm=0.5, quantile=0.7, rate=0.2, norms=0.1)
    (tmp_path / "recipe.toml").write_text(made.toml())
    assert Recipe.read(tmp_path / "recipe.toml").federation == made.federation


THIRD = EDGES[0] | {"name": "third", "silos": list("ijkl")}


@pytest.mark.parametrize(
    "changes",
    [
        SUM | {f"{F}.lora": "alternating"},
        SUM | {f"{F}.compression": {"kind": "sketch", "feedback": False}},
        SUM | {f"{F}.compression": {"kind": "random-k", "feedback": False, "bits": 8}},
        SUM | {f"{F}.optimizer": "adam"},
        SUM | {"edge": EDGES, "root.minimum": 2},
        SUM | {f"{F}.robust": "median", "edge": [*EDGES, THIRD], "silo": least("abcdefghijkl")["silo"]},
        AT_ROOT,
        OPEN,
        OPEN | {f"{F}.compression": "top-k", "boundary.update": {"clip": 1.0, "noise": 0.1}},
        SUM | {"boundary.update": {"noise": 1e-4}},
    ],
    ids=str,
)
def test_what_goes_together(changes: Changes) -> None:
    assert Recipe.of(changed(least(SILOS), changes)).federation.noise is not None


def update(values: dict[str, Any]) -> Case:
    asked = SUM | {"boundary.update": values}
    reason = "boundary.update: with federation.noise the sum is noised"
    return asked, reason, "leave boundary.update out", {"boundary.update": OUT}


REFUSED: list[Case] = [
    (
        SUM | {f"{F}.clip": OUT},
        "federation.clip: noise is measured by a clip",
        "add federation.clip",
        {f"{F}.clip": {"norm": 1.0}},
    ),
    (
        SUM | {f"{F}.noise": OUT},
        "federation.noise: noise is measured by a clip",
        "or leave federation.clip out",
        {f"{F}.clip": OUT},
    ),
    (
        SUM | {f"{F}.secure": False},
        "without masks the root sees each update",
        "set federation.secure.masks = true",
        {f"{F}.secure": True},
    ),
    (
        SUM | {f"{F}.secure": False},
        "without masks the root sees each update",
        "leave federation.noise and federation.clip out",
        {f"{F}.noise": OUT, f"{F}.clip": OUT, "boundary.update": {"clip": 1.0, "noise": 0.1}},
    ),
    (
        SUM | {f"{F}.weights": "examples"},
        "a silo's influence follows from its rows",
        "set federation.weights = 'equal'",
        {f"{F}.weights": "equal"},
    ),
    (SUM | {f"{F}.fairness": "tilted"}, "follows from a silo's loss", "leave fairness out", {f"{F}.fairness": OUT}),
    (
        SUM | {f"{F}.control": "scaffold", "train.optimizer": "sgd"},
        "no longer their mean",
        "set federation.control = 'none'",
        {f"{F}.control": "none"},
    ),
    (
        OPEN | {f"{F}.asynchronous": {"buffer": 2}},
        "all silos count alike",
        "leave buffer out",
        {f"{F}.asynchronous.buffer": OUT},
    ),
    *(
        (
            SUM | {f"{F}.compression": less},
            "cut off by the clip again",
            "set federation.compression.feedback = false",
            {f"{F}.compression.feedback": False},
        )
        for less in ({"kind": "random-k"}, {"bits": 8})
    ),
    (
        SUM | {f"{F}.secure": {"masks": True, "range": 0.5}},
        "no number is larger than federation.clip",
        "leave range out",
        {f"{F}.secure.range": OUT},
    ),
    update({"clip": 1.0, "noise": 0.1}),
    update({"noise": 0.1}),
    update(DP),
    (AT_ROOT | {"edge": EDGES}, "[[edge]]: the root noises the mean", "leave [[edge]] out", {"edge": OUT}),
    (
        AT_ROOT | {"edge": EDGES},
        "with [[edge]] it forms no such mean",
        "set federation.noise.where = 'silos'",
        {f"{F}.noise.where": "silos"},
    ),
    (
        OPEN | {f"{F}.robust": "median"},
        "with federation.robust it forms no such mean",
        "leave federation.robust out",
        {f"{F}.robust": OUT},
    ),
    (
        OPEN | {f"{F}.weights": "examples"},
        "follows from its rows",
        "federation.weights = 'equal'",
        {f"{F}.weights": "equal"},
    ),
    (
        SUM | {f"{F}.noise": {"multiplier": 1.0, "colluding": 8}},
        "8 of 8 silos leave nobody",
        "lower it",
        {f"{F}.noise.colluding": 7},
    ),
    (
        SUM | {f"{F}.noise": {"multiplier": 1.0, "colluding": 3}, "edge": EDGES},
        "3 of 3 silos leave nobody",
        "raise the minimum",
        {"edge.1.minimum": 4},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_does_not_go_together_is_refused(case: Case) -> None:
    assert_mended(case, SILOS)


@pytest.mark.parametrize("weights", ["equal", "examples"])
def test_products_have_no_noise_of_sums(weights: str) -> None:
    asked = OPEN | {f"{F}.lora": "svd", f"{F}.weights": weights}
    reason = "products of factors" if weights == "equal" else "follows from its rows"
    mended = {f"{F}.lora": "alternating", f"{F}.weights": "equal"}
    assert_mended((asked, reason, "federation", mended), SILOS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({f"{F}.compression": "top-k"}, "a masked sum adds the same places"),
        ({f"{F}.lora": "svd"}, "multiplies each silo's factors"),
    ],
)
def test_top_k_and_products_are_refused_under_masks_as_without_noise(changes: Changes, reason: str) -> None:
    key = next(iter(changes))
    assert_mended((SUM | changes, reason, "", {key: OUT}), SILOS)
