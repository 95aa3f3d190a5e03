"""``[model]``: the base model and where it is cut."""

from __future__ import annotations

from pydantic import Field

from isthmus.recipe.section import Count, Dtype, Section


class ModelSection(Section):
    """The base model and where it is cut: silos keep its first and last blocks, the trunk has those in between."""

    path: str = Field(examples=["model"])
    """Folder of a Hugging Face model (``config.json`` and safetensors), or a model id of the Hugging Face hub."""
    bottom: Count = 2
    """Transformer blocks that each silo keeps at the input side."""
    top: Count = 2
    """Transformer blocks that each silo keeps at the output side."""
    dtype: Dtype = "float32"
    """Data type of the model's weights and activations; trunk.dtype may set another for the trunk."""
