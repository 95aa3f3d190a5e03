"""How long parties wait for one another: one setting, from which those that are left out follow."""

from __future__ import annotations

from dataclasses import dataclass

STEP, ROUND, REACH, ANSWER = 1 / 5, 1.0, 1 / 5, 2.0
"""Parts of ``patience``."""
SILENCE = 3 / 4
"""Part of ``reach``."""


@dataclass(frozen=True)
class Waits:
    """Times in seconds."""

    step: float
    """``trunk.patience``: for a slow silo at a training step."""
    round: float
    """``root.patience``: for a slow silo or edge at the end of a round."""
    reach: float
    """``wire.deadline``: for a peer that does not answer."""
    answer: float
    """``wire.answer_deadline``: for an answer that waits for no other party."""

    @property
    def silence(self) -> float:
        """Without a sign of a party that waits: then the network is taken to be broken. It pings twice in ``reach``."""
        return SILENCE * self.reach

    @classmethod
    def of(
        cls,
        patience: float,
        *,
        step: float | None = None,
        round: float | None = None,
        reach: float | None = None,
        answer: float | None = None,
    ) -> Waits:
        """Those that are None follow from ``patience``."""
        return cls(
            step=STEP * patience if step is None else step,
            round=ROUND * patience if round is None else round,
            reach=REACH * patience if reach is None else reach,
            answer=ANSWER * patience if answer is None else answer,
        )
