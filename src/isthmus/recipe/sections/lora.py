"""``[lora]``: the adapters."""

from __future__ import annotations

from pydantic import Field

from isthmus.recipe.section import Count, Positive, Section


class LoraSection(Section):
    """The LoRA adapters, low-rank updates B·A of linear layers, in bottom, trunk and top."""

    rank: Count = 8
    """Rank of each adapter: the columns of B and rows of A."""
    alpha: Positive = 16.0
    """Scale of each adapter: its output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1, strict=False)
    """Names of the linear layers that get an adapter, as the model's own code calls them."""
    freeze_bottom: bool = False
    """If true, bottom gets no adapter and stays the base model's. Silos then train and share top's adapter alone."""
