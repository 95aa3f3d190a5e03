"""Weights of few bits (``trunk.weights``, ``silo.weights``)."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.recipe.sections import ModelSection, SiloSection, TrunkSection

FOR_PROCESSORS = ("int8", "int4")


def check_rounded(model: ModelSection, trunk: TrunkSection, silos: Sequence[SiloSection]) -> None:
    """Refuse weights for processors beside numbers of 16 bits: all else of the part then has 32."""
    dtype = trunk.dtype or model.dtype
    if trunk.weights in FOR_PROCESSORS and dtype != "float32":
        raise ValueError(
            f"trunk.weights: beside {trunk.weights} weights the trunk computes in float32, and its dtype is {dtype}; "
            "set trunk.dtype = 'float32', or trunk.weights = 'nf4', or leave out trunk.weights"
        )
    for silo in silos:
        if silo.weights in FOR_PROCESSORS and model.dtype != "float32":
            raise ValueError(
                f"silo.{silo.name}.weights: beside {silo.weights} weights a silo computes in float32, and model.dtype "
                f"is {model.dtype}; set model.dtype = 'float32', or silo.weights = 'nf4', or leave out silo.weights"
            )
