"""``[federation.noise]``: its size, and who draws it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.recipe.refusals import OUT, Case, assert_mended, changed, least, name_of, refused

BASE = {"federation.secure": True, "federation.weights": "equal", "federation.clip": {"norm": 0.5}}
NOISE = "federation.noise"
REFUSED: list[Case] = [
    (
        BASE | {NOISE: {"multiplier": 1.0, "epsilon": 3.0}},
        f"{NOISE}.multiplier: the size of the noise is given once",
        "either multiplier or epsilon",
        {f"{NOISE}.epsilon": OUT},
    ),
    (BASE | {NOISE: {}}, "given once", "either multiplier or epsilon", {f"{NOISE}.epsilon": 3.0}),
    (
        BASE | {NOISE: {"multiplier": 1.0, "where": "root", "colluding": 1}},
        f"{NOISE}.colluding: the root alone draws",
        "leave colluding out",
        {f"{NOISE}.colluding": OUT},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_impossible_noise_is_refused(case: Case) -> None:
    assert_mended(case)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"multiplier": 0.0}, "multiplier"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"multiplier": 1.0, "where": "edges"}, "where"),
        ({"multiplier": 1.0, "colluding": -1}, "colluding"),
    ],
    ids=str,
)
def test_a_wrong_value_names_its_key(value: dict[str, Any], key: str) -> None:
    assert refused(changed(least(), BASE | {NOISE: value})).message.startswith(f"{NOISE}.{key} = ")
