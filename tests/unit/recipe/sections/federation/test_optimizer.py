"""``[federation.optimizer]``: the keys that each optimizer takes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.recipe.refusals import OUT, Case, assert_mended, changed, least, name_of, refused

PATH = "federation.optimizer"
REFUSED: list[Case] = [
    (
        {f"{PATH}.learning_rate": 0.5},
        f"{PATH}.learning_rate: the optimizer 'none' does not take it",
        "leave learning_rate out",
        {f"{PATH}.learning_rate": OUT},
    ),
    (
        {PATH: {"kind": "momentum", "adaptivity": 0.1}},
        f"{PATH}.adaptivity: the optimizer 'momentum' does not",
        "leave adaptivity out",
        {f"{PATH}.adaptivity": OUT},
    ),
    (
        {PATH: {"kind": "adagrad", "momentum": 0.5}},
        f"{PATH}.momentum: the optimizer 'adagrad' does not",
        "leave momentum out",
        {f"{PATH}.momentum": OUT},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_keys_of_another_optimizer_are_refused(case: Case) -> None:
    assert_mended(case)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("sgd", "kind"),
        ({"kind": "adam", "learning_rate": 0.0}, "learning_rate"),
        ({"kind": "adam", "momentum": 1.0}, "momentum"),
        ({"kind": "adam", "momentum": -0.1}, "momentum"),
        ({"kind": "adam", "second_momentum": 1.0}, "second_momentum"),
        ({"kind": "yogi", "adaptivity": 0.0}, "adaptivity"),
        ({"kind": "yogi", "adaptivity": float("nan")}, "adaptivity"),
    ],
    ids=str,
)
def test_a_wrong_value_names_its_key(value: Any, key: str) -> None:
    assert refused(changed(least(), {PATH: value})).message.startswith(f"{PATH}.{key} = ")
