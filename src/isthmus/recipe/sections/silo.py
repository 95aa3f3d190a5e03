"""``[[silo]]``: the parties that hold the data."""

from __future__ import annotations

from pydantic import Field

from isthmus.recipe.section import Count, Device, Name, Section


class SiloSection(Section):
    """A party that holds data and trains on it. One table for each silo."""

    name: Name = Field(examples=["north"])
    """Name of this silo: 1 to 63 lower-case letters, digits, "-" and "_", beginning with a letter or digit."""
    train: str = Field(examples=["north/train.jsonl"])
    """JSONL file of this silo's own rows."""
    held_out: str | None = Field(default=None, examples=["north/held_out.jsonl"])
    """JSONL file of rows for evaluation only. Left out: this silo does not evaluate."""
    device: Device = "cpu"
    """Where bottom and top compute: "cpu", "cuda", "cuda:1", or "auto" for a CUDA device if there is one."""
    rank: Count | None = Field(default=None, examples=[4])
    """Rank of the adapters in this silo's bottom and top, at most lora.rank; only with federation.lora = "svd". Left
    out: lora.rank. Experimental: learning with several ranks is not measured on a real model."""
    steps: Count | None = Field(default=None, examples=[5])
    """Optimizer steps of this silo in a round. When they are done the others go on without it. Left out:
    train.steps."""
    most_rows: Count | None = Field(default=None, examples=[800])
    """With train.epochs: most training rows that this silo may have. Left out: train.most_rows."""
