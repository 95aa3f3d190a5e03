"""Measures of answers, against the field's own implementations."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_recall_fscore_support

from isthmus.tasks.metrics import (
    METRICS,
    RESAMPLES,
    class_scores,
    confusion,
    difference,
    majority,
    measure,
    token_f1,
    words,
)
from isthmus.tasks.task import Item

TEXTS = st.text(st.sampled_from("abcthe AN.,'-1"), max_size=20)
LABELS = st.sampled_from(["yes", "no", "maybe"])
PAIRS = st.lists(st.tuples(LABELS, LABELS), min_size=2, max_size=20)


def answered(pairs: Sequence[tuple[str, str]], groups: Sequence[str] = ()) -> list[tuple[Item, str]]:
    """Items with one right answer each, and what was given."""
    marks = groups or [""] * len(pairs)
    return [(Item("p", right, (right,), group=mark), said) for (right, said), mark in zip(pairs, marks, strict=True)]


@pytest.mark.parametrize(("right", "share"), [("a", 1.0), ("aab", 2 / 3), ("ab", 0.5), ([(1,), (1,), (2,)], 2 / 3)])
def test_majority_is_the_share_of_the_commonest(right: list[object], share: float) -> None:
    assert majority(right) == share


def harmonic(given_text: str, right: str) -> float:
    """F1 by precision and recall, word by word."""
    one, other = words(given_text), words(right)
    if not one and not other:
        return 1.0
    left, common = list(other), 0
    for word in one:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(one), common / len(other)
    return 2 * precision * recall / (precision + recall)


@given(TEXTS, TEXTS)
def test_f1_of_words_is_the_harmonic_mean_of_precision_and_recall(given_text: str, right: str) -> None:
    assert token_f1(given_text, right) == pytest.approx(harmonic(given_text, right))


@pytest.mark.parametrize(
    ("text", "bare"),
    [("The cat, a dog!", ["cat", "dog"]), ("  A  ", []), ("Theory and an-other", ["theory", "and", "another"])],
)
def test_words_are_compared_as_squad_does(text: str, bare: list[str]) -> None:
    assert words(text) == bare


@given(PAIRS)
def test_f1_over_classes_is_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    right, said = zip(*pairs, strict=True)
    macro = f1_score(right, said, average="macro", labels=sorted({*right, *said}), zero_division=0)
    assert measure(["macro_f1"], answered(pairs))["macro_f1"].value == pytest.approx(macro)
    yes = f1_score([one == "yes" for one in right], [one == "yes" for one in said], zero_division=0)
    assert measure(["f1a"], answered(pairs))["f1a"].value == pytest.approx(yes)


@given(PAIRS)
def test_the_error_of_a_share_is_the_binomials(pairs: list[tuple[str, str]]) -> None:
    score = measure(["accuracy"], answered(pairs))["accuracy"]
    count, share = len(pairs), np.mean([right == said for right, said in pairs])
    assert score.count == count
    assert score.value == pytest.approx(share)
    assert score.error == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))


def test_the_error_of_one_row_is_not_known() -> None:
    one = answered([("yes", "yes")])
    assert all(math.isnan(score.error) for score in measure(["accuracy", "macro_f1"], one).values())


def test_the_bootstraps_error_is_near_the_binomials() -> None:
    pairs = [("yes", "yes"), ("no", "yes")] * 100
    error = measure(["f1a"], answered(pairs))["f1a"].error
    expected = np.std([2 * p / (1 + p) for p in np.random.default_rng(0).binomial(200, 0.5, RESAMPLES) / 200])
    assert error == pytest.approx(expected, rel=0.2)
    assert measure(["f1a"], answered(pairs))["f1a"].error == error, "it is the same at each call"


def test_a_question_is_right_if_all_its_items_are() -> None:
    pairs = [("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "yes")]
    score = measure(["exact_match"], answered(pairs, ["1", "1", "2", "2"]))["exact_match"]
    assert (score.value, score.count) == (0.5, 2)
    assert measure(["exact_match"], answered(pairs))["exact_match"].value == 0.75


def test_the_best_of_several_right_answers_counts() -> None:
    item = Item("p", " the cat", ("the cat", "a dog"))
    for name in ("token_f1", "exact_match", "accuracy", "rouge1", "rougeL"):
        assert measure([name], [(item, "a dog")])[name].value == 1.0
    assert measure(["token_f1"], [(item, "dog house")])["token_f1"].value == pytest.approx(2 / 3)


def test_rouge_stems_and_counts_pairs() -> None:
    item = Item("p", "x", ("the patients walked home",))
    scores = measure(["rouge1", "rouge2", "rougeL"], [(item, "patient walks home")])
    assert scores["rouge1"].value == pytest.approx(6 / 7)
    assert scores["rouge2"].value == pytest.approx(4 / 5)
    assert scores["rougeL"].value == pytest.approx(6 / 7)


def test_confusion_counts_pairs() -> None:
    assert confusion(answered([("a", "a"), ("a", "b"), ("a", "b")])) == {("a", "a"): 1, ("a", "b"): 2}


@pytest.mark.parametrize("name", [one for one in METRICS if "rouge" not in one])
def test_a_difference_is_of_values_and_its_error_of_paired_rows(name: str) -> None:
    draw = random.Random(name)
    right = [draw.choice(["yes", "no"]) for _ in range(60)]
    one = [(item, item.right[0] if draw.random() < 0.8 else "no") for item, _ in answered([(r, r) for r in right])]
    other = [(item, given if draw.random() < 0.9 else "yes") for item, given in one]
    found = difference(name, one, other)
    apart = measure([name], one)[name], measure([name], other)[name]
    assert found.value == pytest.approx(apart[0].value - apart[1].value)
    assert 0 < found.error < math.hypot(*(score.error for score in apart)), "models that err alike differ surely"
    same = difference(name, one, one)
    assert same.value == same.error == 0.0


@given(st.lists(st.tuples(*[st.sampled_from("abc")] * 2), min_size=1, max_size=30))
def test_scores_of_classes_are_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    found = class_scores(confusion(answered(pairs)))
    right, said = zip(*pairs, strict=True)
    names = sorted({*right, *said})
    assert list(found) == names
    measures = precision_recall_fscore_support(right, said, labels=names, zero_division=math.nan)
    for name, precision, recall, f1, count in zip(names, *measures, strict=True):
        one = found[name]
        assert (one.count, one.given) == (count, said.count(name))
        assert one.precision == pytest.approx(precision, nan_ok=True)
        assert one.recall == pytest.approx(recall, nan_ok=True)
        assert one.f1 == pytest.approx(0.0 if math.isnan(f1) else f1)


def test_any_right_answer_counts_in_classes() -> None:
    item = Item("p", "a", ("a", "b"), ("a", "b", "c"), ("a", "b", "c"))
    assert confusion([(item, "b"), (item, "c")]) == {("b", "b"): 1, ("a", "c"): 1}
    assert measure(["macro_f1"], [(item, "b"), (item, "a")])["macro_f1"].value == 1.0
