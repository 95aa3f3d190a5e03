"""Progress of a run, read from the journals (``metrics.jsonl``) that its silos write in the run directory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory


@dataclass
class SiloStatus:
    """One silo's state in a run so far."""

    name: str
    steps: int = 0
    """Number of finished optimizer steps, over all rounds."""
    loss: float | None = None
    """Mean loss of the last step; None before the first step, or if the last step had no row."""
    tokens_per_second: float | None = None
    """Mean over the last ten steps; None before the first step."""
    sent_bytes: int = 0
    """Bytes sent in this run to the trunk and, as updates, to the aggregator, by all processes of this silo."""
    received_bytes: int = 0
    """Bytes received from trunk and aggregator, by all processes of this silo."""
    learned: bool = False
    """Whether a step had a row to train on."""
    epsilon: float | None = None
    """Largest epsilon of a record so far, ∞ where no bound holds; None before the first step."""
    skipped: int = 0
    """Number of rows left out of steps because their record's privacy budget was spent."""
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    """Held-out ``accuracy``, or ``loss`` and ``perplexity``, by number of finished rounds."""
    step_seconds: float = 0.0
    """Time of all training steps."""
    evaluation_seconds: float = 0.0
    """Time of all evaluations."""
    evaluation_epsilon: float | None = None
    """Largest epsilon of a record by evaluations alone, ∞ where no bound holds; None before the first."""
    evaluation_bytes: int = 0
    """Bytes that evaluations sent to the trunk and received from it; part of the two above."""


def read_progress(run: RunDirectory, name: str, steps_a_round: int | None) -> SiloStatus:
    """One silo's progress so far.

    Args:
        steps_a_round: optimizer steps of this silo in one round; None: they follow from its rows.
    """
    progress = SiloStatus(name)
    lines = read_journal(run.role(name).path / "metrics.jsonl")
    steps = [line for line in lines if line["event"] == "step"]
    progress.step_seconds = sum(line["seconds"] for line in steps)
    if steps:
        last, recent = steps[-1], steps[-10:]
        progress.steps = (
            len({(line["round"], line["step"]) for line in steps})
            if steps_a_round is None
            else (last["round"] - 1) * steps_a_round + last["step"]
        )
        progress.loss = last["loss"]
        progress.epsilon = math.inf if last.get("epsilon") is None else last["epsilon"]
        progress.skipped = sum(line.get("skipped", 0) for line in steps)
        progress.tokens_per_second = sum(line["tokens"] for line in recent) / max(
            1e-9, sum(line["seconds"] for line in recent)
        )
    progress.learned = any(line["loss"] is not None for line in steps)
    progress.sent_bytes, progress.received_bytes = _total(lines, "sent_bytes"), _total(lines, "received_bytes")
    for line in lines:
        if line["event"] == "update":
            progress.sent_bytes += line["own_sent_bytes"]
            progress.received_bytes += line["own_received_bytes"]
        if line["event"] == "evaluation":
            known = ("accuracy", "loss", "perplexity")
            progress.scores[line["round"]] = {key: line[key] for key in known if key in line}
            if "epsilon" in line:
                progress.evaluation_epsilon = math.inf if line["epsilon"] is None else line["epsilon"]
            progress.evaluation_seconds += line.get("seconds", 0.0)
            progress.evaluation_bytes += line.get("own_sent_bytes", 0) + line.get("own_received_bytes", 0)
    return progress


def _total(lines: list[dict[str, float]], key: str) -> int:
    """Total of a counter that each process of the silo starts at 0: the sum of its last values."""
    total = last = 0.0
    for line in lines:
        value = line.get(key, last)
        total += last if value < last else 0
        last = value
    return int(total + last)
