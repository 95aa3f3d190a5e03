"""The recipe's section on sensitivity: which text is protected more than the rest, and by how much."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from isthmus.recipe.section import Amount, Positive, Section

DetectorName = Literal[
    "card", "date", "email", "iban", "ip", "name", "national-id", "phone", "record-number", "url"
]  # fmt: skip
DETECTORS: tuple[str, ...] = get_args(DetectorName)
NORMAL = "normal"
"""The class of all text that nothing says more of; its weight is 1 unless the recipe has a class of this name."""
DETECTED = "high"


class SensitivityClass(Section):
    """How text of one class is treated."""

    noise: Positive = 1.0
    """Standard deviation of its noise, relative to the other classes'. The average power stays the boundary's."""
    epsilon: Positive | None = None
    """Budget of a record that holds any text of this class; left out: ``privacy.record_epsilon``."""


class SensitivitySection(Section):
    """What is sensitive in a silo's text. Where several say something of a word, the class with most noise holds."""

    detectors: dict[str, str] = Field(default={})
    """Patterns (with checksums, where there are some) to look for, each with the class of what it finds. A list gives
    all of them the class ``detected``."""
    detected: str = DETECTED
    """Class of what detectors find that are given as a list."""
    fields: dict[str, str] = Field(default={})
    """Class of what a field of the data row fills in the templates."""
    function: str | None = None
    """``module:name`` or ``file.py:name`` of the silo's own function: gets a text, gives (start, end, class) each."""
    names: str | None = None
    """File of names to look for, one a line (the detector ``name`` finds them too)."""
    region: Annotated[str, Field(pattern="^[A-Z]{2}$")] = "US"
    """Country whose phone numbers are found without a country code."""
    attention: Amount = 0.0
    """By how much bottom's attention turns away from sensitive tokens (times their class's weight, on the logits)."""
    classes: dict[str, SensitivityClass] = Field(default={})

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
            raise ValueError(f"sensitivity.function: {self.function!r} names no function; write 'module:name'")
        if self.names is not None and "name" not in self.detectors:
            raise ValueError("sensitivity.names: the detector 'name' is off; add it to sensitivity.detectors")
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
            raise ValueError(f"sensitivity.{key}: there is no {kind} {name!r}; did you mean {near!r}? known: {listed}")
