"""Stepping the trunk from a Hugging Face ``Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isthmus.silo.remote import RoundsClient


class TrunkStepCallback(TrainerCallback):
    """Has the trunk step its adapter whenever the trainer's optimizer steps the silo's.

    One ``train()`` is one round. The trunk's optimizer is the recipe's, at a constant learning rate, and it never
    sees the trainer's. To train all parts as one model, give ``TrainingArguments`` the recipe's optimizer and rate,
    ``lr_scheduler_type="constant"``, ``weight_decay=0`` and ``max_grad_norm=0`` (a silo cannot see the trunk's part
    of the norm), and the recipe as many ``train.steps`` as the trainer takes: after those the trunk saves the round.

    Rows are the trainer's: none is left out in silence. Where a record's privacy budget does not bear a step,
    ``train()`` ends with ``BudgetExhausted``, and the tensor that would cost too much does not leave.
    ``boundary.affordable`` tells which rows can take a whole step, so that a data set can be filtered before;
    ``isthmus silo`` leaves spent rows out itself.

    Args:
        rounds: the silo's, ``silo.rounds``.
        participants: the silos that train together, this one among them; each step waits for all.
        round: number of this round, from 1; the trunk goes on from the end of the round before.
        weight: this silo's share in each step, in any unit that all participants use.
    """

    def __init__(self, rounds: RoundsClient, participants: list[str], *, round: int = 1, weight: float = 1.0) -> None:
        self._rounds = rounds
        self._participants = participants
        self._round = round
        self._weight = weight
        self._step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step = 0
        self._rounds.begin(self._round, self._participants)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._step += 1
        self._rounds.commit(self._round, self._step, self._weight)
