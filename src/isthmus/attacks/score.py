"""Scores of recovered tokens, with bootstrap confidence intervals over rows.

A guess may be shorter or longer than the row, since an adversary may not know the length. It is aligned with the row at
the end where more tokens agree, which favours the attack.
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

ABSENT = -1
"""Token id in a guess where the attack gives no token."""
_Rows = TypeVar("_Rows")
Detokenize = Callable[[list[int]], str]


@dataclass(frozen=True)
class Figure:
    """A measure with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RowScore:
    """The measures of one row, from which the figures are aggregated."""

    hits: int
    """Number of right tokens."""
    tokens: int
    exact: float
    rouge1: float
    rouge2: float
    rougeL: float
    bleu4: float


def score(
    truth: Sequence[Sequence[int]],
    guess: Sequence[Sequence[int]],
    decode: Detokenize,
    *,
    only: Sequence[Sequence[bool]] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Figure]:
    """Token accuracy, exact match, ROUGE-1, ROUGE-2, ROUGE-L (F1) and BLEU-4 (smoothed), each 0 to 1.

    ROUGE and BLEU are means over rows.

    Args:
        truth: the true tokens of each row.
        guess: the recovered tokens of each row, of any length.
        decode: converts tokens to text.
        only: mask of the scored tokens of each row; rows without a scored token are left out. None: all tokens.
        resamples: bootstrap samples of the rows for the percentile interval.
        confidence: of the interval.

    Raises:
        AttackError: truth, guess and masks differ in number of rows, a mask differs from its row in length, or no
            token is scored.
    """
    masks = [[True] * len(row) for row in truth] if only is None else only
    if not len(truth) == len(guess) == len(masks):
        raise AttackError(
            f"{len(guess)} guesses and {len(masks)} masks for {len(truth)} rows", remedy="give one for each row"
        )
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    rows = [
        _row(right, aligned_guess(right, guessed), mask, decode, scorer)
        for right, guessed, mask in zip(truth, guess, masks, strict=True)
        if any(_checked(right, mask))
    ]
    if not rows:
        raise AttackError("no token to score", remedy="attack rows with at least one scored token")
    return _figures(rows, resamples, confidence, random.Random(seed))


def share(right: Sequence[bool], *, confidence: float = 0.95) -> Figure:
    """The share of right rows, 0 to 1, with its exact confidence interval (Clopper and Pearson 1934).

    Unlike a bootstrap interval, the exact one is not empty if no row is right.

    Raises:
        AttackError: there are no rows.
    """
    if not right:
        raise AttackError("no row to score", remedy="attack at least one row")
    interval = binomtest(sum(right), len(right)).proportion_ci(confidence, method="exact")
    return Figure(fmean(right), float(interval.low), float(interval.high))


def aligned_guess(truth: Sequence[int], guess: Sequence[int]) -> list[int]:
    """The guess cut or padded with ``ABSENT`` to the row's length, at the end where more tokens agree.

    The beginning is taken if both ends agree equally.
    """
    length, missing = len(truth), max(len(truth) - len(guess), 0)
    left = [*guess[:length], *[ABSENT] * missing]
    right = [*[ABSENT] * missing, *guess[max(len(guess) - length, 0) :]]
    return max(left, right, key=lambda aligned: hits(truth, aligned))


def hits(truth: Sequence[int], guess: Sequence[int]) -> int:
    """Number of positions with equal tokens, of two rows of one length."""
    return sum(right == guessed for right, guessed in zip(truth, guess, strict=True))


def _checked(truth: Sequence[int], mask: Sequence[bool]) -> Sequence[bool]:
    if len(mask) != len(truth):
        raise AttackError(f"a mask of {len(mask)} for a row of {len(truth)} tokens", remedy="give one value per token")
    return mask


def _row(
    truth: Sequence[int], guess: Sequence[int], mask: Sequence[bool], decode: Detokenize, scorer: RougeScorer
) -> RowScore:
    right = [token for token, counts in zip(truth, mask, strict=True) if counts]
    guessed = [token for token, counts in zip(guess, mask, strict=True) if counts]
    reference, text = decode(right), decode([token for token in guessed if token != ABSENT])
    rouge = scorer.score(reference, text)
    bleu = sentence_bleu(text, [reference]).score / 100
    return RowScore(
        hits(right, guessed),
        len(right),
        float(right == guessed),
        rouge["rouge1"].fmeasure,
        rouge["rouge2"].fmeasure,
        rouge["rougeL"].fmeasure,
        bleu,
    )


MEASURES: Mapping[str, Callable[[Sequence[RowScore]], float]] = {
    "token_accuracy": lambda rows: sum(row.hits for row in rows) / sum(row.tokens for row in rows),
    "exact_match": lambda rows: fmean(row.exact for row in rows),
    "rouge1": lambda rows: fmean(row.rouge1 for row in rows),
    "rouge2": lambda rows: fmean(row.rouge2 for row in rows),
    "rougeL": lambda rows: fmean(row.rougeL for row in rows),
    "bleu4": lambda rows: fmean(row.bleu4 for row in rows),
}


def _figures(rows: list[RowScore], resamples: int, confidence: float, draw: random.Random) -> dict[str, Figure]:
    samples = [draw.choices(rows, k=len(rows)) for _ in range(resamples)]
    return {name: bootstrap(measure, rows, samples, confidence) for name, measure in MEASURES.items()}


def bootstrap(measure: Callable[[_Rows], float], rows: _Rows, samples: Iterable[_Rows], confidence: float) -> Figure:
    """A measure of these rows, with the percentile bootstrap interval.

    Args:
        samples: bootstrap samples of the rows.
        confidence: of the interval.
    """
    drawn = np.array([measure(sample) for sample in samples])
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Figure(measure(rows), float(low), float(high))
