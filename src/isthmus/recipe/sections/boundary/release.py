"""``[boundary.forward]``, ``[boundary.gradient]`` and ``[boundary.update]``: clip and noise of one kind of tensor."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Amount, Chance, Positive, Section

MECHANISM_KEYS = {
    "gaussian": {"clip", "noise"},
    "dp_gaussian": {"clip", "epsilon", "delta", "unit"},
    "metric": {"clip", "epsilon"},
}
"""The keys that each mechanism takes."""
NEEDED = {"gaussian": (), "dp_gaussian": ("clip", "epsilon", "delta"), "metric": ("epsilon",)}
"""The keys that each mechanism cannot do without."""


class ReleaseSection(Section):
    """Clip and noise of one kind of tensor before it leaves a silo."""

    mechanism: Literal["gaussian", "dp_gaussian", "metric"] = "gaussian"
    """"gaussian": Gaussian noise of the given standard deviation. "dp_gaussian": Gaussian noise calibrated to epsilon
    and delta. "metric": noise that hides a vector among its neighbours (dχ-privacy); experimental: on a real
    model it hid nothing and cost accuracy."""
    clip: Amount = 0.0
    """Largest L2 norm of one row: a token's vector, or the whole update; with unit = "sequence" of all rows of a
    sequence together. 0: no clip, and so no finite epsilon."""
    noise: Amount = 0.0
    """Standard deviation of the noise on every coordinate, in the tensor's own units; only with "gaussian"."""
    epsilon: Positive | None = Field(default=None, examples=[8.0])
    """With "dp_gaussian" the epsilon of one unit's release; with "metric" the epsilon for each unit of L2 distance
    between two vectors. Needed by both."""
    delta: Chance | None = Field(default=None, examples=[1e-5])
    """The delta of one unit's release; needed by "dp_gaussian"."""
    unit: Literal["token", "sequence"] = "token"
    """Whether "dp_gaussian" protects one token's vector, or all vectors of a sequence together."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        fields = ReleaseSection.model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].default} - {"mechanism"}
        for name in sorted(changed - MECHANISM_KEYS[self.mechanism]):
            raise ValueError(f"{name}: the mechanism {self.mechanism!r} does not take it; leave {name} out")
        for name in NEEDED[self.mechanism]:
            if not getattr(self, name):
                raise ValueError(f"{name}: the mechanism {self.mechanism!r} needs it; add {name}")
        return self

    @property
    def bounded(self) -> bool:
        """Whether a release has a finite epsilon."""
        return self.clip > 0 and (self.noise > 0 or self.epsilon is not None)
