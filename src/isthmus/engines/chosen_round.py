"""The round of a run that is used: the last, the best by held-out rows, or one by number."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from isthmus.errors import RecipeError, RunError
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory

BEST, LAST = "best", "last"
HeldOutScores = Mapping[int, Mapping[str, float]]
"""``accuracy``, or ``loss`` and ``perplexity``, by round."""


def chosen_round(run: RunDirectory, asked: str | int | None = None) -> int | None:
    """The number of the round that is asked for; None: the last one that trunk and root both have.

    Args:
        asked: ``best``, ``last``, or a number; None: the best where trunk and root are here and the recipe has
            ``train.evaluate = "best"``, else the last.

    Raises:
        RecipeError: it is none of these.
        RunError: the round is not kept here, or no round has scores.
    """
    number = _named(run, asked)
    if number == LAST:
        return None
    if number == BEST:
        return _best_of_silos(run)
    if not str(number).isascii() or not str(number).isdecimal() or not int(number):
        raise RecipeError(f"{asked!r} is no round", remedy="name best, last, or the number of a round from 1")
    kept = kept_rounds(run)
    if kept is not None and int(number) not in kept:
        raise RunError(
            f"{run.path} keeps no round {number}",
            remedy=f"name one of these: {', '.join(map(str, sorted(kept))) or 'none'}; "
            'train.keep_rounds and train.evaluate = "best" say how many are kept',
        )
    return int(number)


def chooses_best(run: RunDirectory, asked: str | int | None = None) -> bool:
    """Whether the round that is asked for is chosen by held-out rows."""
    return _named(run, asked) == BEST


def _named(run: RunDirectory, asked: str | int | None) -> str | int:
    if asked is None:
        train = run.recipe().train
        return BEST if run.served_here and train.rounds and train.evaluate == BEST else LAST
    return asked


def better_round(run: RunDirectory, number: int) -> int | None:
    """The round that is kept here and was better on held-out rows than this one; None: there is none, or no scores
    say so."""
    silos = [journal_scores(run.role(name).path / "metrics.jsonl") for name in run.silos()]
    best = best_round(silos, kept_rounds(run))
    return None if best == number else best


def kept_rounds(run: RunDirectory) -> set[int] | None:
    """The rounds from 1 that both trunk and root have in this folder; None: they are elsewhere."""
    if not run.served_here:
        return None
    return (run.role("trunk").rounds() & run.role("root").rounds()) - {0}


def best_round(scores: Iterable[HeldOutScores], kept: set[int] | None = None) -> int | None:
    """The round with the greatest mean accuracy, or the least mean loss, of all silos; of equal ones the first.

    Args:
        scores: of each silo. A round counts if all silos that have scores have one after it.
        kept: the rounds to choose from; None: all from 1.
    """
    silos = [one for one in scores if one]
    if not silos:
        return None
    rounds = set.intersection(*(set(one) for one in silos)) - {0}
    chosen = sorted(rounds if kept is None else rounds & kept)
    if not chosen:
        return None
    accurate = all("accuracy" in one[number] for one in silos for number in chosen)

    def worth(number: int) -> float:
        values = [one[number]["accuracy"] if accurate else -one[number]["loss"] for one in silos]
        return statistics.fmean(values)

    return max(chosen, key=worth)


def journal_scores(journal: Path, silo: str | None = None) -> dict[int, dict[str, float]]:
    """What evaluations of a journal (``metrics.jsonl``) found, by round.

    Args:
        silo: whose, in a journal of several.
    """
    lines = [line for line in read_journal(journal) if line["event"] == "evaluation"]
    return {line["round"]: _scores(line) for line in lines if silo is None or line["silo"] == silo}


def _scores(line: Mapping[str, Any]) -> dict[str, float]:
    found = line.get("scores", line)
    return {key: found[key] for key in ("accuracy", "loss", "perplexity") if key in found}


def _best_of_silos(run: RunDirectory) -> int:
    kept = kept_rounds(run)
    silos = [journal_scores(run.role(name).path / "metrics.jsonl") for name in run.silos()]
    best = best_round(silos, kept)
    if best is None:
        raise RunError(
            f"no round that {run.path} keeps was measured on held-out rows of all its silos",
            remedy='train with train.evaluate = "best", or name another round, such as last',
        )
    return best
