"""``[train]``: training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Amount, Count, Momentum, Positive, Section

DuplicatePolicy = Literal["warn", "drop", "refuse"]
"""What becomes of training rows that are held out too."""
MOST_ROWS = 100_000
"""Most rows of a silo with ``train.epochs`` where the recipe says nothing."""


EVERY = 10
LASTING_ROUNDS = 10
"""About so many evaluated rounds are kept until the end."""
"""Rounds between evaluations where a recipe does not say when."""


class TrainSection(Section):
    """Training: rounds, and the steps that each silo takes in a round."""

    rounds: Annotated[int, Field(ge=0)] = 40
    """Rounds of training; each ends with an average of the silos' updates. 0: nothing trains. Silos then need no rows,
    the trunk takes no training step, and the model is that of model.path, with the adapter of lora.start if there is
    one."""
    keep_rounds: Annotated[int, Field(ge=2)] = 10
    """Last rounds whose files each party keeps, besides round 0, the start, and of those that are evaluated about ten;
    older ones are removed, which bounds the disk. A model that was saved in a loop of your own goes on only from a
    round that the trunk keeps."""
    steps: Count = 1
    """Optimizer steps of each silo in a round, unless the silo has its own silo.steps. A split step waits for the
    trunk anyway, and an update is smaller than a step's hidden states, so that averaging after every step costs little.
    More steps suit slow links to the root, large cohorts under masks, and noise on updates, which is charged once a
    round."""
    epochs: Count | None = Field(default=None, examples=[3])
    """Passes over each silo's rows in the whole run, in place of steps: every row is drawn once before any comes again,
    the last batch of a pass may be smaller, and the passes are divided evenly among the rounds. A silo with more rows
    takes more steps; the others do not wait for it. Left out: steps says how long a round is."""
    most_rows: Count | None = Field(default=None, examples=[5000])
    """With epochs: most training rows that a silo may have, unless it has its own silo.most_rows. A silo says itself
    how many it has, so this bounds what one that lies weighs in a round, and how far everybody's learning rate follows
    it: set it to your largest silo's. Left out: 100,000."""
    batch: Count = 4
    """Rows in each optimizer step of each silo."""
    micro_batches: Annotated[int, Field(ge=1, le=64)] = 1
    """Parts that a step's rows are sent in, several in flight at a time, which hides the latency of the network."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of bottom, trunk and top."""
    learning_rate: Positive = 5e-4
    """Learning rate of that optimizer, at its highest."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up, over all steps of the run: "linear" and "cosine" end at 0, as
    transformers' schedules of these names. Each silo counts its own steps, the trunk those of the silo with most;
    the step within the run follows from round and step, whoever was missing."""
    warmup: Amount = 0.0
    """Optimizer steps over which the learning rate rises from 0 at the first of them; below 1 a share of all steps of
    the run."""
    weight_decay: Amount = 0.0
    """Weight decay of that optimizer, of all trained matrices of every part; the vector of boundary.residual has
    none."""
    max_grad_norm: Positive | None = Field(default=None, examples=[1.0])
    """Largest L2 norm of a step's gradients; longer ones are scaled down to it. Each party clips what it steps: a silo
    its bottom and top together, the trunk its own part. No party knows the norm of the whole model's gradients. Left
    out: nothing is clipped."""
    momentum: Momentum = 0.0
    """Momentum of "sgd": the share of the earlier steps that each step keeps; only with "sgd". Experimental: plain SGD
    ended far above AdamW on a real model, and with momentum it is not measured."""
    proximal: Amount = 0.0
    """Weight μ of FedProx: μ·(w - w₀) is added to the gradients of bottom's and top's adapters, where w₀ is their state
    at the start of the round (Li et al. 2020). Experimental: no recorded gain on two sets of unlike silos."""
    sharpness: Amount = 0.0
    """Radius ρ of sharpness-aware steps: the gradient is computed at this L2 distance uphill of bottom's and top's
    adapters (SAM, Foret et al. 2021; FedSAM, Qu et al. 2022). Each step then has two passes, and both cross and are
    charged. 0: plain steps. Experimental: on two sets of unlike silos it cost 1.8 times the work and gained no
    round."""
    max_tokens: Count = 512
    """Longest row in tokens; see long_rows."""
    long_rows: Literal["truncate", "skip", "refuse"] = "truncate"
    """What a silo does with its rows that are longer. "truncate": they lose the beginning of their prompt; an answer is
    never cut. "skip": they are left out. "refuse": the run does not start. Each silo says how many there are."""
    duplicates: DuplicatePolicy = "warn"
    """What a silo does with its training rows whose prompts are held out too, whatever their case and white space; they
    make its scores too good. "warn": it says so, and trains on them. "drop": it does not train on them. "refuse": the
    run does not start."""
    evaluate: bool | Literal["end", "best"] | Count | None = Field(default=None, examples=[10])
    """When to evaluate on held-out rows: accuracy with task.choices, otherwise loss. A number: before the first round,
    after every so many, and after the last; "end": before the first and after the last; "best": ten times in the run
    and before the first, and the best of these rounds is the one that is used afterwards, in place of the last; true:
    after each; false: never. Held-out rows cross as training rows do, and are charged. Left out: 10, if a silo has
    held-out rows."""
    evaluate_rows: Count | None = Field(default=None, examples=[200])
    """Most held-out rows of a silo that an evaluation reads, drawn once by the seed. Left out: all."""

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
        if self.epochs is not None and self.steps != type(self).model_fields["steps"].default:
            raise ValueError("epochs: silos take as many steps as their rows need; leave train.steps out, or epochs")
        if self.epochs is None and self.most_rows is not None:
            raise ValueError(
                "most_rows: only train.epochs makes steps of rows; leave most_rows out, or set train.epochs"
            )
        if self.epochs is not None and not self.rounds:
            raise ValueError("epochs: nothing trains with train.rounds = 0; leave epochs out, or raise train.rounds")
        if self.rounds and self.epochs is None and self.warmup >= self.rounds * self.steps:
            raise ValueError(
                f"warmup: {self.warmup:g} steps of warm-up, but the run has {self.rounds * self.steps} in all; "
                "lower train.warmup"
            )
        return self

    def evaluates_after(self, round: int) -> bool:
        """Whether held-out rows are read after this round; 0: before the first. Where nothing trains none are."""
        if not self.rounds:
            return False
        if isinstance(self.evaluate, bool):
            return self.evaluate
        every = self._every()
        return round in (0, self.rounds) or (every is not None and round % every == 0)

    def keeps(self, round: int) -> bool:
        """Whether this round's files stay, however many came after it: of the rounds that are evaluated about ten do,
        among which the best is found afterwards."""
        every = self._every()
        if every is None or not self.evaluates_after(round):
            return False
        apart = every if self.evaluate == "best" else every * -(-self.rounds // (LASTING_ROUNDS * every))
        return round == self.rounds or round % apart == 0

    def _every(self) -> int | None:
        """Rounds from one evaluation to the next; None: there are none but before the first and after the last."""
        if self.evaluate == "best":
            return max(1, self.rounds // LASTING_ROUNDS)
        if self.evaluate in (False, "end"):
            return None
        return EVERY if self.evaluate is None else int(self.evaluate)

    @property
    def step_tokens(self) -> int:
        """Most tokens of one silo in one optimizer step: of ``batch`` rows as long as rows may be."""
        return self.batch * self.max_tokens

    def rate(self, step: int, total: int) -> float:
        """The learning rate of one optimizer step, equal to that of ``transformers.get_scheduler``.

        Args:
            step: number of the step within the run, from 1.
            total: optimizer steps of the run.
        """
        done, warm = step - 1, self._warm(total)
        if done < warm:
            return self.learning_rate * (done / max(1, warm))
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "linear":
            return self.learning_rate * max(0.0, (total - done) / max(1, total - warm))
        gone = (done - warm) / max(1, total - warm)
        return self.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * gone)))

    def reach(self, rates: Sequence[float]) -> float:
        """How far local steps go, in steps of the full learning rate: ‖a‖₁ of FedNova (Wang et al. 2020).

        Under the proximal pull of plain SGD a step counts for less the more come after it: (1 - (1 - ημ)^τ) / ημ at a
        constant rate. Momentum is a silo's own from round to round, so that every gradient has its whole effect in the
        end, whatever the round's length, and AdamW's steps are of one size at one rate: of both, rates are added.

        Args:
            rates: the learning rate of each step, in order.
        """
        pull = self.proximal if self.optimizer == "sgd" and not self.momentum else 0.0
        reach = 0.0
        for rate in rates:
            reach = reach * (1 - rate * pull) + rate / self.learning_rate
        return reach

    def _warm(self, total: int) -> int:
        """Steps of warm-up."""
        return int(self.warmup) if self.warmup >= 1 else math.ceil(total * self.warmup)
