"""Labels of a tiny classification: all found from clean gradients, none from drowned ones."""

from __future__ import annotations

import random

import pytest
import torch

from isthmus.attacks.gradients.labels import (
    LabelClassifier,
    answer_gradients,
    cluster_labels,
    clustering_accuracy,
    match_choices,
)
from isthmus.errors import DataError
from tests.unit.attacks.conftest import PartsOf
from tests.unit.attacks.victims import Seen, step

CHOICES = [[40], [71], [12]]
WEIGHT = 4


def rows(count: int, classes: int, seed: int) -> list[tuple[list[int], int]]:
    draw = random.Random(seed)
    return [([*draw.choices(range(4, 97), k=draw.randint(3, 12)), 30], draw.randrange(classes)) for _ in range(count)]


def seen_by_trunk(parts_of: PartsOf, told: list[tuple[list[int], int]], **how: float) -> list[Seen]:
    parts = parts_of("llama")
    return [
        step(parts, prompt, CHOICES[label], weight=WEIGHT, seed=number, **how)  # type: ignore[arg-type]
        for number, (prompt, label) in enumerate(told)
    ]


def at_answers(seen: list[Seen]) -> torch.Tensor:
    return answer_gradients(torch.cat([one.e_LD for one in seen]), [len(one.e_LD) for one in seen])


def accuracy(found: list[int], told: list[tuple[list[int], int]]) -> float:
    return sum(one == label for one, (_, label) in zip(found, told, strict=True)) / len(told)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("known", [True, False], ids=["weight-known", "direction-only"])
def test_matching_finds_every_label_in_clean_gradients(parts_of: PartsOf, clip: float, known: bool) -> None:
    told = rows(30, 3, seed=1)
    seen = seen_by_trunk(parts_of, told, clip=clip)
    top = parts_of("llama").top
    weight = WEIGHT if known else None
    found = [match_choices(top, one.g_LD, one.e_LD, CHOICES, weight=weight, clip=clip) for one in seen]
    assert accuracy(found, told) == 1.0


def test_matching_takes_answers_of_several_tokens(parts_of: PartsOf) -> None:
    parts, choices = parts_of("llama"), [[40, 9], [71], [40, 10]]
    for label, choice in enumerate(choices):
        seen = step(parts, [9, 30, 22, 61, 30], choice, weight=WEIGHT, filler=2 - len(choice))
        assert match_choices(parts.top, seen.g_LD, seen.e_LD, choices, weight=WEIGHT) == label


def test_clusters_are_the_labels_of_clean_gradients(parts_of: PartsOf) -> None:
    for classes, least in ((2, 0.95), (3, 0.9)):
        told = rows(60, classes, seed=2)
        groups = cluster_labels(at_answers(seen_by_trunk(parts_of, told)), classes)
        assert clustering_accuracy(groups, [label for _, label in told]) >= least


def test_a_colluder_s_labels_teach_the_others_(parts_of: PartsOf) -> None:
    own, others = rows(150, 3, seed=3), rows(60, 3, seed=4)
    for noise, least in ((0.0, 1.0), (0.01, 0.8)):
        learned = LabelClassifier(at_answers(seen_by_trunk(parts_of, own, noise=noise)), [label for _, label in own])
        found = learned.predict(at_answers(seen_by_trunk(parts_of, others, noise=noise)))
        assert accuracy(found, others) >= least


def test_heavy_noise_leaves_chance(parts_of: PartsOf) -> None:
    own, others = rows(90, 3, seed=5), rows(90, 3, seed=6)
    mine, theirs = (seen_by_trunk(parts_of, told, clip=0.05, noise=5.0) for told in (own, others))
    top = parts_of("llama").top
    matched = [match_choices(top, one.g_LD, one.e_LD, CHOICES, weight=WEIGHT, clip=0.05) for one in theirs]
    learned = LabelClassifier(at_answers(mine), [label for _, label in own]).predict(at_answers(theirs))
    grouped = clustering_accuracy(cluster_labels(at_answers(theirs), 3), [label for _, label in others])
    assert max(accuracy(matched, others), accuracy(learned, others), grouped) < 0.52  # chance 1/3, and 3.7 deviations


def test_agreement_names_groups_in_the_best_way() -> None:
    assert clustering_accuracy([1, 1, 0, 0], [0, 0, 1, 1]) == 1.0
    assert clustering_accuracy([0, 0, 0, 1], [0, 1, 0, 1]) == 0.75


def test_unusable_input_is_named() -> None:
    with pytest.raises(DataError, match="answers of 1"):
        answer_gradients(torch.zeros(3, 2), [1, 2])
    with pytest.raises(DataError, match="one label"):
        LabelClassifier(torch.randn(4, 3), [1, 1, 1, 1])
