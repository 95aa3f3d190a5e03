"""``[sensitivity]``: text that is protected more than the rest."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from isthmus.recipe.section import Amount, Country, Positive, Section

DetectorName = Literal[
    "card", "date", "email", "iban", "ip", "name", "national-id", "phone", "record-number", "url"
]  # fmt: skip
DETECTORS: tuple[str, ...] = get_args(DetectorName)
NORMAL = "normal"
"""The class of all text to which nothing gives another; its weight is 1 unless the recipe has a class of this name."""
DETECTED = "high"
"""The class of what detectors find, unless the recipe names another."""


class SensitivityClass(Section):
    """How text of one class is treated."""

    noise: Positive = 1.0
    """Standard deviation of the noise on this class, relative to the other classes; text without a class has 1. The
    average power stays that of the boundary. Experimental: no recorded gain over the same noise on all text."""
    epsilon: Positive | None = Field(default=None, examples=[4.0])
    """Budget of a record that holds any text of this class. Left out: privacy.record_epsilon."""


class SensitivitySection(Section):
    """Which text is sensitive, and how much more noise it gets. A word to which several keys give a class has the class
    with most noise. Left out: all text is treated alike."""

    detectors: dict[str, str] = Field(default={}, examples=[{"email": "high"}])
    """Patterns, with checksums where there are any, that are searched for, each with the class of what it finds:
    "card", "date", "email", "iban", "ip", "name", "national-id", "phone", "record-number", "url". A list of detectors
    gives all of them the class of detected."""
    detected: str = DETECTED
    """Class of what detectors find that are given as a list."""
    fields: dict[str, str] = Field(default={}, examples=[{"text": "high"}])
    """For fields of the data row that the templates use: the class of their text."""
    function: str | None = Field(default=None, examples=["mine.py:find"])
    """Function of the silo that finds sensitive text, as "module:name" or "file.py:name". It gets a text and returns
    (start, end, class) for each finding. Left out: none."""
    names: str | None = Field(default=None, examples=["names.txt"])
    """File of names, one on each line, that the detector "name" finds too. Left out: none."""
    region: Country = "US"
    """Country, as two capital letters, whose phone numbers are found without a country code."""
    attention: Amount = 0.0
    """How much bottom's attention turns away from sensitive tokens: for classes with more noise than other text, this
    times the class's noise is subtracted from the attention logits. Experimental: not measured on a real model."""
    classes: dict[str, SensitivityClass] = Field(default={})
    """The classes, by name."""

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("detectors"), list | tuple):
            return {**values, "detectors": dict.fromkeys(values["detectors"], values.get("detected", DETECTED))}
        return values

    @model_validator(mode="after")
    def _known(self) -> Self:
        _refuse_unknown("detectors", "detector", self.detectors, DETECTORS)
        classes = [*self.classes, NORMAL]
        _refuse_unknown("detectors", "class", self.detectors.values(), classes)
        _refuse_unknown("fields", "class", self.fields.values(), classes)
        if self.function is not None and not all(self.function.rpartition(":")[::2]):
            raise ValueError(f"function: {self.function!r} names no function; write 'module:name'")
        if self.names is not None and "name" not in self.detectors:
            raise ValueError("names: the detector 'name' is off; add it to sensitivity.detectors")
        return self

    def anchored(self, absolute: Callable[[str], str]) -> Self:
        """The same section with its paths made absolute."""
        changed: dict[str, str] = {}
        if self.names is not None:
            changed["names"] = absolute(self.names)
        if self.function is not None:
            place, _, name = self.function.rpartition(":")
            if place.endswith(".py"):
                changed["function"] = f"{absolute(place)}:{name}"
        return self.model_copy(update=changed)


def _refuse_unknown(key: str, kind: str, used: Iterable[str], known: Iterable[str]) -> None:
    choices = sorted(known)
    for name in used:
        if name not in choices:
            near = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]
            listed = ", ".join(choices)
            raise ValueError(f"{key}: there is no {kind} {name!r}; did you mean {near!r}? known: {listed}")
