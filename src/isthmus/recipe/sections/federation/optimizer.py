"""``[federation.optimizer]``: the root's step."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Chance, Momentum, Positive, Section

OPTIMIZER_KEYS = {
    "none": set(),
    "momentum": {"learning_rate", "momentum"},
    "adagrad": {"learning_rate", "adaptivity"},
    "adam": {"learning_rate", "momentum", "second_momentum", "adaptivity"},
    "yogi": {"learning_rate", "momentum", "second_momentum", "adaptivity"},
}
"""The keys that each optimizer takes."""
LEARNING_RATES = {"none": 1.0, "momentum": 1.0, "adagrad": 1e-3, "adam": 1e-3, "yogi": 1e-3}
"""Learning rates where the recipe names none. Scaled steps are about as large as the rate: small, as adapters are."""


class OptimizerSection(Section):
    """How the root steps with the change of a round; ``optimizer = "adam"`` sets kind."""

    main = "kind"

    kind: Literal["none", "momentum", "adagrad", "adam", "yogi"] = "none"
    """"none": by the change itself (FedAvg). "momentum": with momentum (Hsu et al. 2019). "adagrad", "adam", "yogi":
    scaled for each parameter (Reddi et al. 2021). All but "none" are experimental: momentum ended higher in the runs
    recorded, the others are not measured on a real model."""
    learning_rate: Positive | None = Field(default=None, examples=[1.0])
    """Factor of each step. Left out: 1 for momentum; 0.001 for the three that scale, whose steps are about this large
    for each parameter that the silos agree on."""
    momentum: Momentum = 0.9
    """Share of the earlier rounds' steps that is kept (β₁)."""
    second_momentum: Chance = 0.99
    """Share of the earlier rounds' squared changes that is kept (β₂); adam and yogi."""
    adaptivity: Positive = 1e-3
    """Size of a change well below which it is not scaled up (τ); adagrad, adam and yogi."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        fields = OptimizerSection.model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].default} - {"kind"}
        for name in sorted(changed - OPTIMIZER_KEYS[self.kind]):
            raise ValueError(f"{name}: the optimizer {self.kind!r} does not take it; leave {name} out")
        return self

    @property
    def rate(self) -> float:
        """Factor of each step."""
        return LEARNING_RATES[self.kind] if self.learning_rate is None else self.learning_rate
