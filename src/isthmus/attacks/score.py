"""How much an attack recovered, with bootstrap intervals over rows.

A guess may be shorter or longer than the truth (the adversary need not know the length). It is laid against the truth
at whichever end agrees more, which favours the attack.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_bleu
from scipy.stats import binomtest

from isthmus.errors import AttackError

ROUGES = ("rouge1", "rouge2", "rougeL")
ABSENT = -1
"""Stands where a guess says nothing."""
Rows = TypeVar("Rows")
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Figure:
    """A measure with its interval, all 0 to 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One row's measures."""

    hits: int
    tokens: int
    exact: float
    rouge1: float
    rouge2: float
    rougeL: float
    bleu4: float


def score(
    truth: Sequence[Sequence[int]],
    guess: Sequence[Sequence[int]],
    decode: Decode,
    *,
    only: Sequence[Sequence[bool]] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Figure]:
    """Token accuracy, exact match, ROUGE-1/2/L (F1) and BLEU-4 (smoothed, a row's mean).

    Args:
        decode: tokens to text.
        only: of each row, which tokens count; rows without one are left out. None: all.
        resamples: of the rows, for the interval (percentile bootstrap).

    Raises:
        AttackError: rows of truth, guess and mask differ in number or length, or no token counts.
    """
    masks = [[True] * len(row) for row in truth] if only is None else only
    if not len(truth) == len(guess) == len(masks):
        raise AttackError(
            f"{len(guess)} guesses and {len(masks)} masks for {len(truth)} rows", remedy="give one for each row"
        )
    scorer = RougeScorer(list(ROUGES))
    rows = [
        _row(right, laid(right, said), mask, decode, scorer)
        for right, said, mask in zip(truth, guess, masks, strict=True)
        if any(_fitting(right, mask))
    ]
    if not rows:
        raise AttackError("no token to score", remedy="attack rows that hold some")
    return _figures(rows, resamples, confidence, random.Random(seed))


def share(right: Sequence[bool], *, confidence: float = 0.95) -> Figure:
    """The share of rows that are right, with its exact interval (Clopper and Pearson 1934).

    A bootstrap would say of none in twenty that there can be none at all.

    Raises:
        AttackError: there are none.
    """
    if not right:
        raise AttackError("no row to score", remedy="attack some")
    interval = binomtest(sum(right), len(right)).proportion_ci(confidence, method="exact")
    return Figure(fmean(right), float(interval.low), float(interval.high))


def laid(truth: Sequence[int], guess: Sequence[int]) -> list[int]:
    """The guess with as many tokens as the truth, laid at the end that agrees more (the beginning, if both do)."""
    length, missing = len(truth), max(len(truth) - len(guess), 0)
    left = [*guess[:length], *[ABSENT] * missing]
    right = [*[ABSENT] * missing, *guess[max(len(guess) - length, 0) :]]
    return max(left, right, key=lambda laid: hits(truth, laid))


def hits(truth: Sequence[int], guess: Sequence[int]) -> int:
    """Places that agree, of two rows of one length."""
    return sum(right == said for right, said in zip(truth, guess, strict=True))


def _fitting(truth: Sequence[int], mask: Sequence[bool]) -> Sequence[bool]:
    if len(mask) != len(truth):
        raise AttackError(f"a mask of {len(mask)} for a row of {len(truth)} tokens", remedy="give one value a token")
    return mask


def _row(truth: Sequence[int], guess: Sequence[int], mask: Sequence[bool], decode: Decode, scorer: RougeScorer) -> Row:
    right = [token for token, counts in zip(truth, mask, strict=True) if counts]
    said = [token for token, counts in zip(guess, mask, strict=True) if counts]
    found = hits(right, said)
    reference, text = decode(right), decode([token for token in said if token != ABSENT])
    rouge = scorer.score(reference, text)
    bleu = sentence_bleu(text, [reference]).score / 100
    return Row(
        found,
        len(right),
        float(right == said),
        rouge["rouge1"].fmeasure,
        rouge["rouge2"].fmeasure,
        rouge["rougeL"].fmeasure,
        bleu,
    )


MEASURES: Mapping[str, Callable[[Sequence[Row]], float]] = {
    "token_accuracy": lambda rows: sum(row.hits for row in rows) / sum(row.tokens for row in rows),
    "exact_match": lambda rows: fmean(row.exact for row in rows),
    "rouge1": lambda rows: fmean(row.rouge1 for row in rows),
    "rouge2": lambda rows: fmean(row.rouge2 for row in rows),
    "rougeL": lambda rows: fmean(row.rougeL for row in rows),
    "bleu4": lambda rows: fmean(row.bleu4 for row in rows),
}


def _figures(rows: list[Row], resamples: int, confidence: float, draw: random.Random) -> dict[str, Figure]:
    samples = [draw.choices(rows, k=len(rows)) for _ in range(resamples)]
    return {name: bootstrap(measure, rows, samples, confidence) for name, measure in MEASURES.items()}


def bootstrap(measure: Callable[[Rows], float], rows: Rows, samples: Iterable[Rows], confidence: float) -> Figure:
    """A measure of these rows, with the percentile bootstrap's interval from samples of them."""
    drawn = np.array([measure(sample) for sample in samples])
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Figure(measure(rows), float(low), float(high))
