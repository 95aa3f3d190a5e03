"""A callback of the Hugging Face ``Trainer`` that steps the trunk's adapter."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isthmus.silo.remote import RoundsClient


class TrunkStepCallback(TrainerCallback):
    """Steps the trunk's adapter at each optimizer step of the trainer.

    One ``train()`` is one round. The trunk uses the recipe's optimizer at a constant learning rate, independently of
    the trainer's. To train all parts as one model, give ``TrainingArguments`` the recipe's optimizer and learning rate,
    ``lr_scheduler_type="constant"``, ``weight_decay=0`` and ``max_grad_norm=0`` (the silo lacks the trunk's part of
    the gradient norm), and set ``train.steps`` to the trainer's number of steps: the trunk then saves the round.

    No row is skipped. If a record's privacy budget does not allow a step, ``train()`` raises ``BudgetExhausted``, and
    the tensor that would exceed the budget does not leave. ``boundary.affordable`` says which rows fit their budgets,
    to filter a data set beforehand. ``isthmus silo`` skips rows whose budget is spent.

    Args:
        rounds: the trunk's client, ``silo.rounds``.
        participants: names of the silos that train together, this one included. Each step waits for all of them.
        round: number of this round, from 1. The trunk continues from the round before.
        weight: this silo's weight in the average of a step, in any unit that all participants share.
    """

    def __init__(self, rounds: RoundsClient, participants: list[str], *, round: int = 1, weight: float = 1.0) -> None:
        self._rounds = rounds
        self._participants = participants
        self._round = round
        self._weight = weight
        self._step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the round on the trunk."""
        self._step = 0
        self._rounds.begin(self._round, self._participants)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Step the trunk's adapter and wait for it."""
        self._step += 1
        self._rounds.commit(self._round, self._step, self._weight)
