"""Weights of few bits beside other numbers of few bits."""

from __future__ import annotations

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import OUT, Changes, assert_mended, changed, least

MENDED: list[Changes] = [{"trunk.dtype": "float32"}, {"trunk.weights": "nf4"}, {"trunk.weights": OUT}]
ASKED: list[tuple[Changes, list[Changes]]] = [
    ({"trunk.weights": "int8", "model.dtype": "bfloat16"}, MENDED),
    ({"trunk.weights": "int8", "trunk.dtype": "float16"}, MENDED),
    ({"trunk.weights": "int4", "trunk.dtype": "bfloat16"}, MENDED),
]


@pytest.mark.parametrize(("asked", "mended"), [(one, other) for one, others in ASKED for other in others], ids=str)
def test_the_other_numbers_have_32_bits(asked: Changes, mended: Changes) -> None:
    assert_mended(
        (
            asked,
            f"beside {asked['trunk.weights']} weights the trunk computes in float32",
            "leave out trunk.weights",
            mended,
        )
    )


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_silos_may_have_16_bits_beside_them(weights: str) -> None:
    asked = {"trunk.weights": weights, "trunk.dtype": "float32", "model.dtype": "bfloat16"}
    assert Recipe.of(changed(least(), asked)).trunk.weights == weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_beside_4_bits_for_accelerators_they_may_have_any(dtype: str) -> None:
    assert Recipe.of(changed(least(), {"trunk.weights": "nf4", "trunk.dtype": dtype})).trunk.dtype == dtype


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_of_a_silo_the_other_numbers_have_32_bits(weights: str) -> None:
    asked = {"silo.0.weights": weights, "model.dtype": "bfloat16"}
    mended: list[Changes] = [{"model.dtype": "float32"}, {"silo.0.weights": "nf4"}, {"silo.0.weights": OUT}]
    for one in mended:
        assert_mended((asked, f"beside {weights} weights a silo computes in float32", "leave out silo.weights", one))
