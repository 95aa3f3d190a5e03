"""``[[silo]]``: the parties that hold the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from isthmus.recipe.section import Count, Device, Name, Section, Weights

HUB_SET = "datasets:"
"""The beginning of a source that is a set of the Hugging Face hub, and no path."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


DataSources = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed), Field(min_length=1, strict=False)
]
"""One or several places of rows; one may be written without a list."""
FileFormat = Literal["jsonl", "json", "csv", "tsv", "parquet"]


def anchored_sources(sources: DataSources, absolute: Callable[[str], str]) -> DataSources:
    """The same places with paths made absolute."""
    return tuple(one if one.startswith(HUB_SET) else absolute(one) for one in sources)


class SiloSection(Section):
    """A party that holds data and trains on it. One table for each silo."""

    name: Name = Field(examples=["north"])
    """Name of this silo: 1 to 63 lower-case letters, digits, "-" and "_", beginning with a letter or digit."""
    train: DataSources | None = Field(default=None, examples=["north/train.jsonl"])
    """This silo's own rows: a file, a folder, a pattern such as "north/*.csv", or a list of these. JSONL, JSON, CSV,
    TSV and Parquet, each also as .gz; with the extra "data" also "datasets:NAME:SPLIT" of the Hugging Face hub
    ("datasets:NAME@CONFIGURATION:SPLIT") and folders that save_to_disk wrote. Left out: its part of [partition]."""
    held_out: DataSources | None = Field(default=None, examples=["north/held_out.jsonl"])
    """Rows for evaluation only, as train. Left out: this silo does not evaluate."""
    format: FileFormat | None = Field(default=None, examples=["csv"])
    """Format of all this silo's files. Left out: the ends of their names tell."""
    columns: dict[str, str] | None = Field(default=None, examples=[{"prompt": "note", "answer": "code"}])
    """Names of fields that the templates use, each with the name that this silo's files have for it. Left out: the
    same."""
    device: Device = "cpu"
    """Where bottom and top compute: "cpu", "cuda", "cuda:1", or "auto" for a CUDA device if there is one."""
    recompute: bool = False
    """If true, bottom and top keep no activations in training: they compute them again for the backward, a few rows at
    a time. Less memory for long rows and large batches, about a third more computing in this silo."""
    weights: Weights | None = Field(default=None, examples=["int8"])
    """The linear layers of this silo's blocks are kept in few bits, of the kinds that trunk.weights has, and its
    embedding and head in 8: for a machine with little memory, and on a processor for faster answers. They then are not
    quite the base model's, in training and in use. Left out: as model.dtype says."""
    rank: Count | None = Field(default=None, examples=[4])
    """Rank of the adapters in this silo's bottom and top, at most lora.rank; only with federation.lora = "svd". Left
    out: lora.rank. Experimental: learning with several ranks is not measured on a real model."""
    bottom: Count | None = Field(default=None, examples=[3])
    """Transformer blocks that this silo keeps at the input side, at least model.bottom. Left out: model.bottom."""
    top: Count | None = Field(default=None, examples=[3])
    """Transformer blocks that this silo keeps at the output side, at least model.top. Left out: model.top."""
    steps: Count | None = Field(default=None, examples=[5])
    """Optimizer steps of this silo in a round. When they are done the others go on without it. Left out:
    train.steps."""
    most_rows: Count | None = Field(default=None, examples=[800])
    """With train.epochs: most training rows that this silo may have. Left out: train.most_rows."""

    def anchored(self, absolute: Callable[[str], str]) -> Self:
        """The same table with its paths made absolute."""
        train, held_out = (one and anchored_sources(one, absolute) for one in (self.train, self.held_out))
        return self.model_copy(update={"train": train, "held_out": held_out})
