"""``[lora]``: the adapters."""

from __future__ import annotations

import math
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from isthmus.recipe.section import Count, Momentum, Positive, Section

ALL_LINEAR = "all-linear"


class LoraSection(Section):
    """The LoRA adapters, low-rank updates B·A of linear layers, in bottom, trunk and top."""

    rank: Count = 8
    """Rank of each adapter: the columns of B and rows of A."""
    alpha: Positive = 16.0
    """Scale of each adapter: its output is multiplied by alpha / rank."""
    rslora: bool = False
    """If true, it is multiplied by alpha / √rank in place of alpha / rank (rsLoRA, Kalajdzievski 2023)."""
    dropout: Momentum = 0.0
    """Chance that a number of an adapter's input is left out in training, in every part; inputs that stay are scaled
    up. The masks follow from the seed, the round and the step, so that a run that is resumed has the same ones."""
    targets: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1, strict=False)
    """Names of the linear layers that get an adapter, as the model's own code calls them. "all-linear": all but the
    head."""
    freeze_bottom: bool = False
    """If true, bottom gets no adapter and stays the base model's. Silos then train and share top's adapter alone."""
    start: str | None = Field(default=None, examples=["adapter"])
    """Folder of a PEFT adapter that bottom, trunk and top start from, with the rank, alpha, rslora and layers that are
    given here. All parties need it. Left out: B starts at zero, A follows from the seed."""

    @field_validator("targets", mode="before")
    @classmethod
    def _all_linear(cls, value: Any) -> Any:
        return (value,) if value == ALL_LINEAR else value

    @model_validator(mode="after")
    def _alone(self) -> Self:
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            raise ValueError("targets: 'all-linear' has every layer already; leave the other names out")
        return self

    @property
    def all_linear(self) -> bool:
        """Whether all linear layers but the head get an adapter."""
        return self.targets == (ALL_LINEAR,)

    @property
    def scale(self) -> float:
        """The factor of an adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def ranked(self, rank: int) -> LoraSection:
        """The same adapters of another rank, with alpha such that the scale stays."""
        ratio = rank / self.rank
        return self.model_copy(
            update={"rank": rank, "alpha": self.alpha * (math.sqrt(ratio) if self.rslora else ratio)}
        )
