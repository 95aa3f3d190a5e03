"""``[train]``: training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Amount, Count, Momentum, Positive, Section


class TrainSection(Section):
    """Training: rounds, and the steps that each silo takes in a round."""

    rounds: Count = 4
    """Rounds of training; each ends with an average of the silos' updates."""
    steps: Count = 10
    """Optimizer steps of each silo in a round, unless the silo has its own silo.steps."""
    batch: Count = 4
    """Rows in each optimizer step of each silo."""
    micro_batches: Annotated[int, Field(ge=1, le=64)] = 1
    """Parts that a step's rows are sent in, several in flight at a time, which hides the latency of the network."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of bottom, trunk and top."""
    learning_rate: Positive = 5e-4
    """Learning rate of that optimizer."""
    momentum: Momentum = 0.0
    """Momentum of "sgd": the share of the earlier steps that each step keeps; only with "sgd". Experimental: plain SGD
    ended far above AdamW on a real model, and with momentum it is not measured."""
    proximal: Amount = 0.0
    """Weight μ of FedProx: μ·(w - w₀) is added to the gradients of bottom's and top's adapters, where w₀ is their state
    at the start of the round (Li et al. 2020). Experimental: not measured on a real model."""
    sharpness: Amount = 0.0
    """Radius ρ of sharpness-aware steps: the gradient is computed at this L2 distance uphill of bottom's and top's
    adapters (SAM, Foret et al. 2021; FedSAM, Qu et al. 2022). Each step then has two passes, and both cross and are
    charged. 0: plain steps. Experimental: not measured on a real model."""
    max_tokens: Count = 512
    """Longest row in tokens. Longer rows lose the beginning of their prompt."""
    evaluate: bool = True
    """Whether to evaluate on held-out rows before the first round and after each: accuracy with task.choices, otherwise
    loss. Needs silo.held_out of one silo or more."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.optimizer == "sgd" and self.learning_rate * self.proximal >= 1:
            raise ValueError(
                f"proximal: with a learning rate of {self.learning_rate:g}, a step goes beyond the point it is "
                f"pulled to; make train.proximal less than {1 / self.learning_rate:g}"
            )
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"momentum: {self.optimizer!r} has its own averages; set train.optimizer = 'sgd', or leave momentum out"
            )
        return self

    def reach(self, steps: int) -> float:
        """How far so many local steps go, in steps of the learning rate: ‖a‖₁ of FedNova (Wang et al. 2020).

        Under the proximal pull of plain SGD a step counts for less the more come after it: (1 - (1 - ημ)^τ) / ημ.
        Momentum is a silo's own from round to round, so that every gradient has its whole effect in the end, whatever
        the round's length, and AdamW's steps are of one size: of both, steps are counted.
        """
        shrinks = self.learning_rate * self.proximal
        if not shrinks or self.optimizer != "sgd" or self.momentum:
            return float(steps)
        return sum((1 - shrinks) ** later for later in range(steps))
