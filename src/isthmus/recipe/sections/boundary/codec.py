"""``[boundary.codec]``: how matrices are encoded."""

from __future__ import annotations

from typing import Literal

from isthmus.recipe.section import Section

Codec = Literal["fp32", "bf16", "fp16", "int8", "int4", "fp32+zstd", "bf16+zstd", "fp16+zstd", "int8+zstd", "int4+zstd"]


class CodecSection(Section):
    """How matrices are encoded on the wire, in each direction; ``codec = "int8"`` sets all four.

    int8 and int4 have one scale for each block of 32 values and keep outliers exact; "+zstd" compresses the result.
    """

    forward_up: Codec = "fp32"
    """Hidden states on the way to the trunk."""
    forward_down: Codec = "fp32"
    """Hidden states on the way back to the silo."""
    gradient_up: Codec = "fp32"
    """The loss gradient on the way to the trunk. int8 and int4 round gradients stochastically, without bias."""
    gradient_down: Codec = "fp32"
    """The gradient on the way back to bottom, rounded likewise."""
