"""The recipe's section on training: what each silo does by itself in a round."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Amount, Count, Positive, Section
from isthmus.recipe.strategy import Momentum


class TrainSection(Section):
    """What each silo does in a round."""

    rounds: Count = 4
    steps: Count = 10
    """Optimizer steps a round, of silos that have none of their own."""
    batch: Count = 4
    """Rows a step and silo."""
    micro_batches: Annotated[int, Field(ge=1, le=64)] = 1
    """Parts that a step's rows cross in, several on their way at a time: it hides the latency of the wire."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Of bottom, trunk and top alike."""
    learning_rate: Positive = 5e-4
    momentum: Momentum = 0.0
    """sgd: how much of the earlier steps goes on in each."""
    proximal: Amount = 0.0
    """How strongly bottom's and top's adapters are pulled back to where the round began: μ of FedProx (Li et al. 2020),
    whose μ·(w - w₀) is added to their gradients."""
    sharpness: Amount = 0.0
    """How far off bottom's and top's adapters each gradient is taken, where the loss is about highest: ρ of SAM (Foret
    et al. 2021; in federations FedSAM, Qu et al. 2022). A step then is two passes, and both cross and are charged."""
    max_tokens: Count = 512
    """Longest row in tokens; a longer prompt loses its beginning."""
    evaluate: bool = True
    """Measure held-out accuracy (or loss) after every round."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.optimizer == "sgd" and self.learning_rate * self.proximal >= 1:
            raise ValueError(
                f"train.proximal: a step of the rate {self.learning_rate:g} goes beyond where it is pulled to; "
                f"make it less than {1 / self.learning_rate:g}"
            )
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"train.momentum: {self.optimizer!r} has means of its own; set optimizer = 'sgd', or leave momentum out"
            )
        return self
