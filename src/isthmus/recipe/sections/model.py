"""``[model]``: the base model and where it is cut."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from isthmus.recipe.section import Count, Dtype, Section

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class ModelSection(Section):
    """The base model and where it is cut: silos keep its first and last blocks, the trunk has those in between."""

    path: str = Field(examples=["model"])
    """Folder of a Hugging Face model (``config.json`` and safetensors), or a model id of the Hugging Face hub."""
    cut: Literal["stated", "auto"] = "stated"
    """Where the model is cut: as bottom and top state it, or as a measurement on this machine chooses it when
    'isthmus run' starts, which then ignores bottom and top. On separate machines 'isthmus cut --write' chooses."""
    leakage: Share | None = Field(default=None, examples=[0.5])
    """Largest share of a text's tokens that an attack may recover where a measurement chooses the cut. Left out: no
    limit."""
    bottom: Count = 2
    """Transformer blocks that each silo keeps at the input side."""
    top: Count = 2
    """Transformer blocks that each silo keeps at the output side."""
    moves: tuple[dict[Literal["after", "bottom", "top"], Count], ...] | None = Field(
        default=None, strict=False, examples=[[{"after": 10, "bottom": 3}]]
    )
    """Cuts that later rounds have: after this many finished rounds, bottom and top (of one alone the other stays).
    Adapters and the optimizers' moments change sides, and training goes on. Not with edges on machines of their own.
    Left out: the cut stays."""
    dtype: Dtype = "float32"
    """Data type of the model's weights and activations; trunk.dtype may set another for the trunk."""
