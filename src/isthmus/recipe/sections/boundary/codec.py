"""``[boundary.codec]``: how matrices are encoded."""

from __future__ import annotations

from typing import Literal

from isthmus.recipe.section import Section

# fmt: off
Codec = Literal[
    "fp32", "bf16", "fp16", "int8", "int4", "fp32+zstd", "bf16+zstd", "fp16+zstd", "int8+zstd", "int4+zstd",
    "range-0.25", "range-0.5", "range-0.75", "range-1", "range-2",
]
# fmt: on


class CodecSection(Section):
    """How matrices are encoded on the wire, in each direction; ``codec = "int8"`` sets all four.

    int8 and int4 have one scale for each block of 32 values and keep outliers exact; "+zstd" compresses the result.
    "range-0.5" rounds to multiples of half a row's standard deviation, of half the whole matrix's for gradients, and
    writes frequent multiples in fewer bits (range coding).
    """

    forward_up: Codec = "fp32"
    """Hidden states on the way to the trunk."""
    forward_down: Codec = "fp32"
    """Hidden states on the way back to the silo."""
    gradient_up: Codec = "fp32"
    """The loss gradient on the way to the trunk. int8 and int4 round gradients stochastically, without bias."""
    gradient_down: Codec = "fp32"
    """The gradient on the way back to bottom, rounded likewise."""
