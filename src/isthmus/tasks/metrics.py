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
from typing import Any

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
RightAndGiven = tuple[object, object]
"""The right answer (of several the given one, if it is among them, else the first), and the given one."""


def majority(right: Sequence[object]) -> float:
    """Accuracy of a constant prediction, the most common right answer, 0 to 1."""
    return Counter(right).most_common(1)[0][1] / len(right)


def measure(names: Sequence[str], answered: Sequence[Answered]) -> dict[str, Score]:
    """These measures of all answers.

    Args:
        names: of ``METRICS``.
        answered: one item or more.
    """
    return {name: _measured(name, answered) for name in names}


def difference(name: str, answered: Sequence[Answered], other: Sequence[Answered]) -> Score:
    """A measure of one model's answers minus that of another's answers to the same items.

    The standard error is that of paired rows: what makes a row hard for both models does not count.

    Args:
        name: of ``METRICS``.
        answered, other: item by item.
    """
    if name in MEANS:
        values = zip(MEANS[name](answered), MEANS[name](other), strict=True)
        return _mean([one - another for one, another in values])
    value = OF_ALL[name]

    def apart(drawn: Sequence[tuple[RightAndGiven, RightAndGiven]]) -> float:
        return value([one for one, _ in drawn]) - value([another for _, another in drawn])

    return _resampled(list(zip(_pairs(answered), _pairs(other), strict=True)), apart)


def _measured(name: str, answered: Sequence[Answered]) -> Score:
    return _mean(MEANS[name](answered)) if name in MEANS else _resampled(_pairs(answered), OF_ALL[name])


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How well one class is told from the others. All shares are 0 to 1."""

    count: int
    """Rows whose right answer it is."""
    given: int
    """Rows that got it as an answer."""
    precision: float
    """Share of the rows that got it whose right answer it is; without any NaN."""
    recall: float
    """Share of the rows whose right answer it is that got it; without any NaN."""
    f1: float
    """Their harmonic mean, 0 if one of them is 0 or without rows."""


def confusion(answered: Sequence[Answered]) -> dict[tuple[str, str], int]:
    """How often each right answer met each given one; of an item with several right ones the given one, if it is among
    them, else the first."""
    return dict(Counter(_pairs(answered)))


def class_scores(confused: Mapping[tuple[str, str], int]) -> dict[str, ClassScore]:
    """The scores of each class that is right or given somewhere, in alphabetical order.

    Args:
        confused: as of ``confusion``.
    """
    found: dict[str, ClassScore] = {}
    for name in sorted({one for pair in confused for one in pair}):
        count, given = (sum(n for pair, n in confused.items() if pair[side] == name) for side in (0, 1))
        both = confused.get((name, name), 0)
        precision, recall = (both / rows if rows else math.nan for rows in (given, count))
        found[name] = ClassScore(count, given, precision, recall, 2 * both / (count + given))
    return found


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


def _accurate(answered: Sequence[Answered]) -> list[float]:
    return [float(given in item.right) for item, given in answered]


def _exact(answered: Sequence[Answered]) -> list[float]:
    """Of each question, 1 if every item has a right answer."""
    groups: dict[object, list[bool]] = defaultdict(list)
    for number, (item, given) in enumerate(answered):
        same = any(words(given) == words(right) for right in item.right)
        groups[item.group or number].append(same)
    return [float(all(same)) for same in groups.values()]


def _token_f1(answered: Sequence[Answered]) -> list[float]:
    return [max(token_f1(given, right) for right in item.right) for item, given in answered]


def _f1a(pairs: Sequence[RightAndGiven]) -> float:
    """F1 of the answer "yes" over all items (MultiRC's F1a)."""
    return _f1([(right == "yes", given == "yes") for right, given in pairs], True)


def _macro_f1(pairs: Sequence[RightAndGiven]) -> float:
    """Mean of the F1 of each class that is right or given somewhere."""
    return math.fsum(_f1(pairs, one) for one in _classes(pairs)) / len(_classes(pairs))


def _classes(pairs: Sequence[RightAndGiven]) -> set[object]:
    return {one for pair in pairs for one in pair}


def _f1(pairs: Sequence[RightAndGiven], label: object) -> float:
    """F1 of one class, from pairs of the right and the given one; 0 if it is never both."""
    both = sum(right == given == label for right, given in pairs)
    either = sum((right == label) + (given == label) for right, given in pairs)
    return 2 * both / either if either else 0.0


def _rouge(kind: str) -> Callable[[Sequence[Answered]], list[float]]:
    def rouge(answered: Sequence[Answered]) -> list[float]:
        scorer = _scorer(kind)
        return [scorer.score_multi(item.right, given)[kind].fmeasure for item, given in answered]

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


def _pairs(answered: Sequence[Answered]) -> list[tuple[str, str]]:
    return [(given if given in item.right else item.right[0], given) for item, given in answered]


def _resampled(pairs: Sequence[Any], value: Callable[[Sequence[Any]], float]) -> Score:
    """A value with the standard error of the bootstrap over pairs (Efron 1979), the same at each call."""
    draws = random.Random(len(pairs))
    again = [value(draws.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES if len(pairs) > 1 else 0)]
    return Score(value(pairs), math.sqrt(_variance(again)) if again else math.nan, len(pairs))


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((one - mean) ** 2 for one in values) / (len(values) - 1)


MEANS: Mapping[str, Callable[[Sequence[Answered]], list[float]]] = {
    "accuracy": _accurate,
    "exact_match": _exact,
    "token_f1": _token_f1,
    **{kind: _rouge(kind) for kind in ("rouge1", "rouge2", "rougeL")},
}
"""Measures that are means, with what they are the mean of: a value a row, or a question."""
OF_ALL: Mapping[str, Callable[[Sequence[RightAndGiven]], float]] = {"macro_f1": _macro_f1, "f1a": _f1a}
"""Measures of all rows at once."""
METRICS = (*MEANS, *OF_ALL)
"""The names of all measures."""
