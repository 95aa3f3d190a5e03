"""Averaging of adapters: ranks, products of factors, and weights."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import OUT, Case, Changes, assert_mended, changed, least, name_of

CALIBRATED = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 2.0, "delta": 1e-5}
NOISED = {"clip": 1.0, "noise": 0.1}
CLIPPED = {"clip": 1.0, "noise": 0.0}
EDGE = {"name": "e", "address": "localhost:1", "silos": ["a", "b", "c"]}
W, R, S = "federation.weights", "federation.fairness", "federation.secure"
HELD_OUT: Changes = {f"silo.{number}.held_out": "h.jsonl" for number in range(3)}
RANKS: list[Case] = [
    (
        {"silo.0.rank": 4},
        "silo.rank: factors of different ranks have no mean",
        "set federation.lora = 'svd'",
        {"federation.lora": "svd"},
    ),
    (
        {"silo.0.rank": 4, "lora.rank": 3, "federation.lora": "svd"},
        "silo.rank: the root keeps rank 3, less than 4",
        "raise lora.rank",
        {"lora.rank": 4},
    ),
]
SVD: Changes = {"federation.lora": "svd"}
PRODUCTS: list[Case] = [
    (SVD | {S: True}, "of a masked sum it knows none", "federation.secure.masks = false", {S: False}),
    (SVD | {S: True}, "federation.lora: the root multiplies", "'alternating'", {"federation.lora": "alternating"}),
    (SVD | {"edge": [EDGE]}, "edges pass on cohorts' means", "leave [[edge]] out", {"edge": OUT}),
    *(
        (
            SVD | {f"federation.{key}": value},
            f"federation.{key}: with lora = 'svd' products of factors",
            f"leave federation.{key} out",
            {f"federation.{key}": OUT},
        )
        for key, value in (
            ("weights", "equal"),
            ("optimizer", "adam"),
            ("robust", "median"),
            ("compression", "top-k"),
            ("compression", {"bits": 8}),
        )
    ),
    (
        SVD | {"federation.weights": "equal"},
        "products of factors",
        "set federation.lora = 'alternating'",
        {"federation.lora": "alternating"},
    ),
]
WEIGHTS: list[Case] = [
    *(
        ({W: kind, S: True} | HELD_OUT, "the root sees none", "federation.secure.masks = false", {S: False})
        for kind in ("agreement", "inverse-variance", "quality")
    ),
    *(
        ({W: kind, R: fair} | HELD_OUT, "ignores the weight that a silo claims", "'examples' or 'equal'", {W: "equal"})
        for kind, fair in (("agreement", "q-ffl"), ("quality", "agnostic"))
    ),
    ({W: "agreement", R: "q-ffl"}, "ignores the weight that a silo claims", "leave fairness out", {R: OUT}),
    ({W: "quality"}, "measured on held_out rows", "give them to every silo", HELD_OUT),
    ({W: "equal", "edge": [EDGE]}, "an edge sends for a whole cohort", "federation.secure.masks = true", {S: True}),
    ({W: "equal", "edge": [EDGE]}, "by 'equal' each sender counts for one", "weigh by 'examples'", {W: "examples"}),
    ({W: "quality", "edge": [EDGE]} | HELD_OUT, "edges pass on cohorts", "leave [[edge]] out", {"edge": OUT}),
    (
        {R: "tilted", "federation.robust": {"rule": "median"}},
        "the rule 'median' counts all alike",
        "set federation.robust.rule = 'mean'",
        {"federation.robust.rule": "mean"},
    ),
]
INFLUENCE: list[Case] = [
    *(
        (
            {W: kind, "boundary.update": CALIBRATED},
            "no longer bounds its influence",
            "'examples' or 'equal'",
            {W: "equal"},
        )
        for kind in ("agreement", "inverse-variance")
    ),
    (
        {W: "quality", "boundary.update": NOISED} | HELD_OUT,
        "epsilon of boundary.update would not",
        "leave federation.weights out",
        {W: OUT},
    ),
    ({R: "tilted", "boundary.update": CALIBRATED}, "leaves without noise", "leave federation.fairness out", {R: OUT}),
    (
        {R: "q-ffl", S: True, "boundary.update": NOISED},
        "leaves without noise",
        "or the clip",
        {"boundary.update.clip": OUT},
    ),
]


@pytest.mark.parametrize("case", [*RANKS, *PRODUCTS, *WEIGHTS, *INFLUENCE], ids=name_of)
def test_what_cannot_be_averaged_is_refused(case: Case) -> None:
    assert_mended(case)


@pytest.mark.parametrize(
    ("federation", "update"),
    [
        ({"weights": "agreement"}, CLIPPED),
        ({"weights": "agreement"}, NOISED),
        ({"weights": "quality"}, CLIPPED),
        ({"weights": "equal", "optimizer": "yogi", "secure": True}, CALIBRATED),
        ({"weights": "equal", "fairness": "tilted", "secure": True}, CLIPPED),
        ({"fairness": "agnostic", "secure": True, "optimizer": "adam"}, {}),
    ],
    ids=str,
)
def test_what_can_be_together_is_not_refused(federation: dict[str, Any], update: dict[str, Any]) -> None:
    assert Recipe.of(changed(least(), {"federation": federation, "boundary.update": update} | HELD_OUT))
