"""The trainer's callback: one round a training, one commit an optimizer step, numbered from one."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from isthmus.silo.callback import TrunkStepCallback


class Rounds:
    """Notes what is asked of the trunk."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def begin(self, round: int, participants: list[str]) -> None:
        self.asked.append(("begin", round, tuple(participants)))

    def commit(self, round: int, step: int, weight: float) -> None:
        self.asked.append(("commit", round, step, weight))


def test_a_training_is_a_round_of_its_steps() -> None:
    rounds, given = Rounds(), (None, TrainerState(), TrainerControl())
    callback = TrunkStepCallback(rounds, ["a", "b"], round=3, weight=0.5)  # type: ignore[arg-type]
    for _ in range(2):
        callback.on_train_begin(*given)  # type: ignore[arg-type]
        for _ in range(2):
            callback.on_optimizer_step(*given)  # type: ignore[arg-type]
    once = [("begin", 3, ("a", "b")), ("commit", 3, 1, 0.5), ("commit", 3, 2, 0.5)]
    assert rounds.asked == once * 2


def test_participants_must_be_told() -> None:
    with pytest.raises(TypeError):
        TrunkStepCallback(Rounds())  # type: ignore[arg-type,call-arg]
