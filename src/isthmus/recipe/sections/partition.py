"""``[partition]``: one set of rows divided among silos, to simulate a federation on one machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Section
from isthmus.recipe.sections.silo import DataSources, FileFormat, anchored_sources


class PartitionSection(Section):
    """One set of rows divided among all silos that have no train of their own: for simulations on one machine alone,
    where the process of each silo reads the whole set and keeps its part. Each row goes to exactly one silo. Roles that
    are started one by one are refused."""

    data: DataSources = Field(examples=["all.jsonl"])
    """The set, as silo.train."""
    format: FileFormat | None = Field(default=None, examples=["csv"])
    """Format of all its files. Left out: the ends of their names tell."""
    by: Literal["iid", "quantity", "dirichlet", "field"] = "iid"
    """How rows are divided. "iid": at random, evenly. "quantity": at random, in shares drawn from a Dirichlet
    distribution. "dirichlet": the rows of each value of field in shares drawn for it (Hsu et al. 2019). "field": all
    rows of a value of field go to one silo: to that of this name if every value is a silo's name, else each to the silo
    that has fewest rows so far, the most frequent values first."""
    field: str | None = Field(default=None, examples=["label"])
    """Column of the set, by its name there; needed by "dirichlet" and "field", and only there."""
    alpha: Annotated[float, Field(ge=0.001, le=1e6)] = 0.5
    """Concentration of "quantity" and "dirichlet": 100 is nearly even, 0.1 leaves most silos without most values."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each silo's rows that are for evaluation only; silo.held_out names other rows in its place."""
    seed: int | None = Field(default=None, examples=[1])
    """Seed of the division. Left out: the recipe's seed."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        needed = self.by in ("dirichlet", "field")
        if needed and self.field is None:
            raise ValueError(f"field: {self.by!r} divides by a column of the set; name it in partition.field")
        if not needed and self.field is not None:
            raise ValueError(f"field: {self.by!r} looks at no column; leave partition.field out, or set partition.by")
        return self

    def anchored(self, absolute: Callable[[str], str]) -> Self:
        """The same table with its paths made absolute."""
        return self.model_copy(update={"data": anchored_sources(self.data, absolute)})
