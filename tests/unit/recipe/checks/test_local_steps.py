"""Steps of silos between two aggregations: their number, two passes of one step, and controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import OUT, Case, Changes, assert_mended, changed, least, name_of

SGD: Changes = {"train.optimizer": "sgd"}
SCAFFOLD: Changes = SGD | {"federation.control": "scaffold", "federation.weights": "equal"}
BOUNDED = {"clip": 1.0, "noise": 0.1}
EDGES = [{"name": "e", "address": "localhost:1", "silos": ["a", "b", "c"]}]
REFUSED: list[Case] = [
    (
        {"train.sharpness": 0.1, "boundary.defence": {"answer": 1.0}},
        "train.sharpness: a defence learns at every pass",
        "leave boundary.defence out",
        {"boundary.defence": OUT},
    ),
    (
        {"train.sharpness": 0.1, "trunk.adapter": "replica", "lora.freeze_bottom": True},
        "goes through the replicas' mean",
        "set trunk.adapter = 'shared'",
        {"trunk.adapter": "shared"},
    ),
    (
        {"train.sharpness": 0.1, "trunk.adapter": "replica", "lora.freeze_bottom": True},
        "train.sharpness: with a frozen bottom",
        "or train.sharpness = 0",
        {"train.sharpness": 0},
    ),
    (
        {"train.sharpness": 0.1, "lora.dropout": 0.1},
        "train.sharpness: a step has two passes, and with dropout",
        "or lora.dropout = 0",
        {"lora.dropout": 0.0},
    ),
    (
        {"silo.0.steps": 2, "trunk.adapter": "replica"},
        "silo.steps: replicas are averaged at the same steps",
        "set trunk.adapter = 'shared'",
        {"trunk.adapter": "shared"},
    ),
    (
        {"silo.0.steps": 2, "trunk.adapter": "replica"},
        "silo.steps: replicas",
        "give all silos as many steps",
        {"silo.1.steps": 2, "silo.2.steps": 2},
    ),
    (
        {"silo.1.most_rows": 3},
        "silo.most_rows: only train.epochs makes steps of rows",
        "leave it out for b, or set train.epochs",
        {"train.epochs": 2},
    ),
    *(
        ({"train.epochs": 2, **changes}, reason, remedy, mended)
        for changes, reason, remedy, mended in [
            ({"silo.0.steps": 3}, "as many steps as its rows need", "leave silo.steps out", {"silo.0.steps": OUT}),
            (
                {"trunk.adapter": "replica"},
                "train.epochs: replicas",
                "set trunk.adapter = 'shared'",
                {"trunk.adapter": "shared"},
            ),
            (
                {"federation.normalized": True},
                "reveal how many rows",
                "set federation.normalized = false",
                {"federation.normalized": False},
            ),
            (
                {"federation.asynchronous.buffer": 2},
                "versions of a buffer are not rounds",
                "leave federation.asynchronous.buffer out",
                {"federation.asynchronous": OUT},
            ),
            (
                {
                    "federation.control": "scaffold",
                    "federation.weights": "equal",
                    "train.optimizer": "sgd",
                },
                "a control is computed from that",
                "or leave epochs out",
                {"train.epochs": OUT},
            ),
        ]
    ),
    (
        {"federation.normalized": True, "federation.lora": "svd"},
        "federation.normalized: products of factors",
        "set federation.lora = 'alternating'",
        {"federation.lora": "alternating"},
    ),
]
CONTROL: list[Case] = [
    ({"train.optimizer": "adamw"}, "'adamw' goes another way", "set train.optimizer = 'sgd'", SGD),
    ({"train.momentum": 0.9}, "goes on from earlier rounds", "leave train.momentum out", {"train.momentum": OUT}),
    ({"train.weight_decay": 0.1}, "decay of weights", "leave train.weight_decay out", {"train.weight_decay": OUT}),
    ({"train.max_grad_norm": 1.0}, "what clipping left", "train.max_grad_norm out", {"train.max_grad_norm": OUT}),
    ({"train.schedule": "cosine"}, "unequally far", "set train.schedule = 'constant'", {"train.schedule": "constant"}),
    ({"train.warmup": 2}, "unequally far", "leave warmup out", {"train.warmup": OUT}),
    ({"train.proximal": 0.1}, "the proximal pull for a gradient", "leave train.proximal out", {"train.proximal": OUT}),
    *(
        (
            {"federation.weights": kind},
            "where all count alike",
            "set federation.weights = 'equal'",
            {"federation.weights": "equal"},
        )
        for kind in ("examples", "agreement")
    ),
    (
        {"federation.fairness": "tilted"},
        "where all count alike",
        "leave fairness out",
        {"federation.fairness": OUT},
    ),
    (
        {"federation.robust": {"rule": "median"}},
        "reject its control",
        "set federation.robust.rule = 'mean'",
        {"federation.robust.rule": "mean"},
    ),
    ({"federation.robust": {"mix": True}}, "reject its control", "mix = false", {"federation.robust.mix": False}),
    *(
        (
            {"federation.compression": less},
            "count as a gradient of zero",
            "leave federation.compression out",
            {"federation.compression": OUT},
        )
        for less in ("random-k", "top-k", {"bits": 8})
    ),
    ({"edge": EDGES, "federation.secure": True}, "an edge does not know", "leave [[edge]] out", {"edge": OUT}),
    (
        {"silo.0.steps": 2},
        "silos with other numbers of steps",
        "set federation.normalized = true",
        {"federation.normalized": True},
    ),
    (
        {"privacy.record_epsilon": 9.0, "boundary.forward": BOUNDED, "boundary.gradient": BOUNDED},
        "rows that a budget skips",
        "set federation.normalized = true",
        {"federation.normalized": True},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_does_not_go_together_is_refused(case: Case) -> None:
    assert_mended(case)


@pytest.mark.parametrize("case", CONTROL, ids=name_of)
def test_what_no_control_can_be_beside_is_refused(case: Case) -> None:
    changes, reason, remedy, mended = case
    asked = SCAFFOLD | changes
    assert_mended((asked, reason, remedy, mended))
    assert_mended((asked, "federation.control: ", ", or control = 'none'", {"federation.control": "none"}))


def test_a_controls_factors_must_last() -> None:
    asked = SCAFFOLD | {"federation.lora": "svd", "federation.weights": "examples"}
    assert_mended((asked, "federation.control: ", "control = 'none'", {"federation.control": "none"}))


@pytest.mark.parametrize(
    "changes",
    [
        SCAFFOLD | {"train.sharpness": 0.1, "federation.secure": True, "federation.optimizer": "momentum"},
        SCAFFOLD
        | {"silo.0.steps": 2, "silo.1.steps": 5, "federation.normalized": True, "federation.lora": "alternating"},
        SCAFFOLD | {"boundary.update": BOUNDED},
        {"train": {"evaluate": False, "proximal": 0.1, "sharpness": 0.1}, "federation.compression": "top-k"},
        {"train.proximal": 0.1, "federation.robust": "median"},
        {"train.proximal": 1e9},  # AdamW's steps are of one size
        {
            **{f"silo.{number}.steps": number + 1 for number in range(3)},
            "federation": {"normalized": True, "secure": True, "compression": "sketch"},
        },
        {"train.sharpness": 0.1, "trunk.adapter": "replica"},
        {"train.sharpness": 0.1, "lora.freeze_bottom": True, "boundary.release_once": True},
    ],
    ids=str,
)
def test_what_goes_together_is_read_again_as_it_was(changes: dict[str, Any], tmp_path: Path) -> None:
    first = Recipe.of(changed(least(), changes))
    (tmp_path / "recipe.toml").write_text(first.toml())
    again = Recipe.read(tmp_path / "recipe.toml")
    assert (again.train, again.federation) == (first.train, first.federation)
    assert [silo.steps for silo in again.silo] == [silo.steps for silo in first.silo]
