"""Weights of few bits (``trunk.weights``)."""

from __future__ import annotations

from isthmus.recipe.sections import ModelSection, TrunkSection


def check_weights_of_the_trunk(model: ModelSection, trunk: TrunkSection) -> None:
    """Refuse weights for processors beside numbers of 16 bits: all else of the trunk then has 32."""
    dtype = trunk.dtype or model.dtype
    if trunk.weights in ("int8", "int4") and dtype != "float32":
        raise ValueError(
            f"trunk.weights: beside {trunk.weights} weights the trunk computes in float32, and its dtype is {dtype}; "
            "set trunk.dtype = 'float32', or trunk.weights = 'nf4', or leave out trunk.weights"
        )
