"""Measures of a model's answers, each with its standard error.

An answer is the name of the chosen choice, or the written text. All measures are shares, 0 to 1.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from isthmus.errors import NotSupportedError
from isthmus.tasks.task import Item

RESAMPLES = 1000
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Score:
    """A measure over rows."""

    value: float
    error: float
    """Its standard error; of one row NaN."""
    count: int
    """Number of rows, or of questions, that it is the mean of."""


Answered = tuple[Item, str]
"""An item and its answer."""
Measurement = Callable[[Sequence[Answered]], Score]


def accuracy(predicted: Sequence[object], right: Sequence[object]) -> float:
    """Share of predictions that equal the right answer, 0 to 1."""
    return sum(one == other for one, other in zip(predicted, right, strict=True)) / len(right)


def majority(right: Sequence[object]) -> float:
    """Accuracy of a constant prediction, the most common right answer, 0 to 1."""
    return Counter(right).most_common(1)[0][1] / len(right)


def measure(names: Sequence[str], answered: Sequence[Answered]) -> dict[str, Score]:
    """These measures of all answers.

    Args:
        names: of ``METRICS``.
        answered: one item or more.
    """
    return {name: METRICS[name](answered) for name in names}


def confusion(answered: Sequence[Answered]) -> dict[tuple[str, str], int]:
    """How often each right answer (the first of an item) met each given one."""
    return dict(Counter((item.right[0], given) for item, given in answered))


def words(text: str) -> list[str]:
    """A text's words as SQuAD compares them: lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def token_f1(given: str, right: str) -> float:
    """F1 of the words of two texts, as for SQuAD (Rajpurkar et al. 2016)."""
    one, other = words(given), words(right)
    if not one or not other:
        return float(one == other)
    common = (Counter(one) & Counter(other)).total()
    return 2 * common / (len(one) + len(other))


def _accurate(answered: Sequence[Answered]) -> Score:
    return _mean([float(given in item.right) for item, given in answered])


def _exact(answered: Sequence[Answered]) -> Score:
    """Share of questions of which every item has a right answer."""
    groups: dict[object, list[bool]] = defaultdict(list)
    for number, (item, given) in enumerate(answered):
        same = any(words(given) == words(right) for right in item.right)
        groups[item.group or number].append(same)
    return _mean([float(all(same)) for same in groups.values()])


def _token_f1(answered: Sequence[Answered]) -> Score:
    return _mean([max(token_f1(given, right) for right in item.right) for item, given in answered])


def _f1a(answered: Sequence[Answered]) -> Score:
    """F1 of the answer "yes" over all items (MultiRC's F1a)."""
    pairs = [(item.right[0] == "yes", given == "yes") for item, given in answered]
    return _resampled(pairs, lambda drawn: _f1(drawn, True))


def _macro_f1(answered: Sequence[Answered]) -> Score:
    """Mean of the F1 of each class that is right or given somewhere."""
    pairs = [(item.right[0], given) for item, given in answered]
    return _resampled(pairs, lambda drawn: math.fsum(_f1(drawn, one) for one in _classes(drawn)) / len(_classes(drawn)))


def _classes(pairs: Sequence[tuple[object, object]]) -> set[object]:
    return {one for pair in pairs for one in pair}


def _f1(pairs: Sequence[tuple[object, object]], label: object) -> float:
    """F1 of one class, from pairs of the right and the given one; 0 if it is never both."""
    both = sum(right == given == label for right, given in pairs)
    either = sum((right == label) + (given == label) for right, given in pairs)
    return 2 * both / either if either else 0.0


def _rouge(kind: str) -> Measurement:
    def rouge(answered: Sequence[Answered]) -> Score:
        scorer = _scorer(kind)
        return _mean([scorer.score_multi(item.right, given)[kind].fmeasure for item, given in answered])

    return rouge


def _scorer(kind: str):  # type: ignore[no-untyped-def]
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise NotSupportedError(
            "ROUGE needs the package rouge-score", remedy="pip install 'isthmus[evaluate]'"
        ) from error
    return RougeScorer([kind], use_stemmer=True)


def _mean(values: Sequence[float]) -> Score:
    count = len(values)
    mean = math.fsum(values) / count
    error = math.sqrt(math.fsum((one - mean) ** 2 for one in values) / (count - 1) / count) if count > 1 else math.nan
    return Score(mean, error, count)


def _resampled(pairs: Sequence[tuple[object, object]], value: Callable[..., float]) -> Score:
    """A value with the standard error of the bootstrap over pairs (Efron 1979), the same at each call."""
    draws = random.Random(len(pairs))
    again = [value(draws.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES if len(pairs) > 1 else 0)]
    return Score(value(pairs), math.sqrt(_variance(again)) if again else math.nan, len(pairs))


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((one - mean) ** 2 for one in values) / (len(values) - 1)


METRICS: Mapping[str, Measurement] = {
    "accuracy": _accurate,
    "macro_f1": _macro_f1,
    "f1a": _f1a,
    "exact_match": _exact,
    "token_f1": _token_f1,
    **{kind: _rouge(kind) for kind in ("rouge1", "rouge2", "rougeL")},
}
