"""The base of every table of a recipe, and the types of values that several tables share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from isthmus.recipe.address import NoAddress, address_problem

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Chance = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Bound = Annotated[float, Field(ge=1, allow_inf_nan=False)]
DEVICE, NAME, COUNTRY = r"^(auto|cpu|cuda(:\d{1,3})?)$", r"^[a-z0-9][a-z0-9_-]{0,62}$", r"^[A-Z]{2}$"
Device = Annotated[str, Field(pattern=DEVICE)]
Dtype = Literal["float32", "bfloat16", "float16"]
Weights = Literal["int8", "int4", "nf4"]
Name = Annotated[str, Field(pattern=NAME)]
Country = Annotated[str, Field(pattern=COUNTRY)]


def _address(value: str) -> str:
    if problem := address_problem(value):
        raise NoAddress(problem)
    return value


ServerAddress = Annotated[str, AfterValidator(_address)]


class Section(BaseModel):
    """A table of the recipe: frozen, strictly typed, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    main: ClassVar[str | None] = None
    """The key that a bare value in place of the table sets: ``weights = "equal"`` is ``weights.kind = "equal"``."""
    moved: ClassVar[dict[str, str]] = {}
    """Earlier keys of this table and where each lives now, relative to the table."""

    @model_validator(mode="before")
    @classmethod
    def _bare_value(cls, values: Any) -> Any:
        if cls.main is not None and isinstance(values, str | bool):
            return {cls.main: values}
        return values
