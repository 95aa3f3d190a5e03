"""Progress of a run, read from the journals that its roles write. Watching takes nothing out of a silo."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from isthmus.storage.record import RunDirectory, read_journal


@dataclass
class SiloProgress:
    """What one silo's journal says so far."""

    name: str
    steps: int = 0
    """Optimizer steps done in all rounds."""
    loss: float | None = None
    """Of the last step; None if no row could take part in it."""
    tokens_per_second: float | None = None
    """Over the last ten steps."""
    sent_bytes: int = 0
    received_bytes: int = 0
    """Over all processes this silo has had in this run."""
    epsilon: float | None = None
    """Of the worst record so far, ∞ where no bound holds; None before the first step."""
    skipped: int = 0
    """Rows left out of steps because their record's privacy budget was spent."""
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    """Held-out scores by the number of completed rounds."""


def read_progress(run: RunDirectory, name: str, steps_a_round: int) -> SiloProgress:
    """What one silo has done so far."""
    progress = SiloProgress(name)
    lines = read_journal(run.role(name).path / "metrics.jsonl")
    steps = [line for line in lines if line["event"] == "step"]
    if steps:
        last, recent = steps[-1], steps[-10:]
        progress.steps = (last["round"] - 1) * steps_a_round + last["step"]
        progress.loss = last["loss"]
        progress.epsilon = math.inf if last.get("epsilon") is None else last["epsilon"]
        progress.skipped = sum(line.get("skipped", 0) for line in steps)
        progress.tokens_per_second = sum(line["tokens"] for line in recent) / max(
            1e-9, sum(line["seconds"] for line in recent)
        )
    progress.sent_bytes, progress.received_bytes = _total(lines, "sent_bytes"), _total(lines, "received_bytes")
    for line in lines:
        if line["event"] == "evaluation":
            known = ("accuracy", "loss", "perplexity")
            progress.scores[line["round"]] = {key: line[key] for key in known if key in line}
    return progress


def _total(lines: list[dict[str, float]], key: str) -> int:
    """Sum of a counter that starts at zero with every process."""
    total = last = 0.0
    for line in lines:
        value = line.get(key, last)
        total += last if value < last else 0
        last = value
    return int(total + last)
