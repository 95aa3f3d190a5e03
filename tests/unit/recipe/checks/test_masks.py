"""Secure aggregation: cohorts of three, and compression of masked sums."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import OUT, Case, assert_mended, changed, least, name_of

EDGE = {"name": "e", "address": "localhost:1", "silos": list("abc")}
COHORTS: list[Case] = [
    ({"silo": least("ab")["silo"]}, "of a sum of two silos", "have three silos", {"silo": least("abc")["silo"]}),
    ({"root.minimum": 2}, "of a sum of two silos", "root.minimum = 3 or more", {"root.minimum": 3}),
    (
        {"silo": least("abcd")["silo"], "edge": [EDGE | {"silos": list("abcd"), "minimum": 2}]},
        "of a sum of two silos",
        "e.minimum = 3 or more",
        {"edge.0.minimum": 3},
    ),
    (
        {"silo": least("abcd")["silo"], "edge": [EDGE]},
        "'root' would see the update of a silo beside edges by itself",
        "give that silo an edge, too",
        {"edge.0.silos": list("abcd")},
    ),
]


@pytest.mark.parametrize("case", COHORTS, ids=name_of)
def test_masks_want_cohorts_of_three(case: Case) -> None:
    changes, *rest = case
    assert_mended(({"federation.secure": True} | changes, *rest))


COMPRESSION: list[Case] = [
    (
        {"federation.secure": True, "federation.compression": "top-k"},
        "federation.compression: a masked sum adds the same places of all silos",
        "none, random-k, sketch",
        {"federation.compression": "random-k"},
    ),
    (
        {"federation.secure": True, "federation.compression": "top-k"},
        "top-k sends each silo's own",
        "federation.secure.masks = false",
        {"federation.secure": False},
    ),
    (
        {"federation.compression": {"bits": 5}},
        "federation.compression.bits: 5 bits for a number are not possible",
        "4, 8, 16 or 32",
        {"federation.compression.bits": 4},
    ),
    (
        {"federation.secure": True, "federation.compression": {"bits": 32}},
        "federation.compression.bits: 32 bits",
        "2 to 16 with masks, or leave bits out",
        {"federation.compression.bits": OUT},
    ),
]


@pytest.mark.parametrize("case", COMPRESSION, ids=name_of)
def test_compression_that_a_sum_cannot_have_is_refused(case: Case) -> None:
    assert_mended(case)


@pytest.mark.parametrize(
    ("masks", "bits"), [*((True, bits) for bits in range(2, 17)), *((False, bits) for bits in (4, 8, 16, 32))]
)
def test_few_bits(masks: bool, bits: int) -> None:
    asked: dict[str, Any] = {"federation.secure": masks, "federation.compression": {"bits": bits}}
    assert Recipe.of(changed(least(), asked)).federation.compression.bits == bits
