"""The recipe's sections on what becomes of a round's updates: what each counts for, and their step together."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Chance, Positive, Section

Momentum = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Bound = Annotated[float, Field(ge=1, allow_inf_nan=False)]

KEYS = {
    "none": set(),
    "momentum": {"learning_rate", "momentum"},
    "adagrad": {"learning_rate", "adaptivity"},
    "adam": {"learning_rate", "momentum", "second_momentum", "adaptivity"},
    "yogi": {"learning_rate", "momentum", "second_momentum", "adaptivity"},
}
"""What each optimizer can be told."""
FROM_UPDATES = ("agreement", "inverse-variance")
"""Weights that the root reads off single updates."""


class OptimizerSection(Section):
    """How the root steps with a round's change; ``optimizer = "adam"`` stands for ``optimizer.kind``."""

    kind: Literal["none", "momentum", "adagrad", "adam", "yogi"] = "none"
    """The change itself (FedAvg); with momentum (Hsu et al. 2019); or scaled for each parameter (Reddi et al. 2021)."""
    learning_rate: Positive | None = None
    """What a step is multiplied by; left out: 1 for momentum, 0.001 for those that scale, whose every step is about as
    large for each parameter that the silos agree on."""
    momentum: Momentum = 0.9
    """How much of the earlier rounds' steps goes on (β₁)."""
    second_momentum: Chance = 0.99
    """adam, yogi: how much of the earlier rounds' squared changes goes on (β₂)."""
    adaptivity: Positive = 1e-3
    """adagrad, adam, yogi: changes well below it are not scaled up to the others' size (τ)."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        fields = OptimizerSection.model_fields
        told = {name for name in fields if getattr(self, name) != fields[name].default} - {"kind"}
        for name in sorted(told - KEYS[self.kind]):
            raise ValueError(f"{name}: the optimizer {self.kind!r} does not take it; leave {name} out")
        return self


class WeightsSection(Section):
    """What a silo counts for in a round; ``weights = "equal"`` stands for ``weights.kind``."""

    kind: Literal["examples", "equal", "agreement", "inverse-variance", "quality"] = "examples"
    """By the supervised tokens that it trained on (under masks: by the share of its planned rows); all alike; by how
    far its change points where the others' do; by one over its change's variance around the mean; by how well what it
    trained does on its own held-out rows, and how many rounds it took part in."""
    bound: Bound = 2.0
    """agreement, inverse-variance, quality: nobody counts for more than so many times an equal share."""

    @property
    def claimed(self) -> bool:
        """Whether they follow from what silos say of themselves rather than from what the root sees."""
        return self.kind in ("examples", "equal")


class FairnessSection(Section):
    """A silo that does well makes itself lighter, so that the others are heard; ``fairness = "tilted"`` stands for
    ``fairness.kind``. Each silo does so by itself, under masks, too."""

    kind: Literal["none", "q-ffl", "tilted", "agnostic"] = "none"
    """By its loss's power (Li et al. 2020), exponential (Li et al. 2021), or exponential of the sum over all rounds
    (Mohri et al. 2019)."""
    strength: Positive = 1.0
    """The power, or what the exponent is multiplied by."""
    reference: Positive = 2.0
    """A silo whose training loss is at least this at a round's start keeps its weight, below it is lighter."""
    bound: Bound = 4.0
    """No silo makes itself lighter than one over this."""
