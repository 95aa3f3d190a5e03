"""What top got and what came back, as well as the adversary knows: noise by the recipe, and what the trunk answered."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from isthmus.attacks.gradients.top_input import closed, gradients_of, path_noise, results_of
from isthmus.attacks.knowledge import Knowledge
from isthmus.errors import AttackError
from isthmus.recipe import ReleaseSection
from tests.unit.attacks.attacked import Attacked


@pytest.mark.parametrize(
    ("section", "deviation", "of_sequence"),
    [
        (ReleaseSection(noise=0.5, clip=2.0), 0.5, False),
        (ReleaseSection(mechanism="metric", epsilon=4.0), math.sqrt(9) / 4, False),
        (ReleaseSection(mechanism="dp_gaussian", clip=1.0, epsilon=1.0, delta=1e-5, unit="sequence"), None, True),
    ],
)
def test_noise_is_the_recipes(section: ReleaseSection, deviation: float | None, of_sequence: bool) -> None:
    noise = path_noise(section, 8)
    assert noise.of_sequence == of_sequence
    assert noise.clip == section.clip
    if deviation is not None:
        assert noise.deviation == pytest.approx(deviation)


def test_results_and_gradients_are_those_that_crossed(attacked: Attacked) -> None:
    view, truth = attacked(own=5)
    knowledge = Knowledge(view)
    for found in (results_of(knowledge), gradients_of(knowledge)):
        assert [tuple(one.shape) for one in found] == [(len(row), 32) for row in truth]
    assert torch.equal(results_of(knowledge)[0], view.crossings[0].answered_LD)


def test_a_closed_row_has_a_place_for_the_last_token() -> None:
    assert closed(torch.ones(2, 3)).tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]


def test_what_did_not_cross_is_refused(attacked: Attacked) -> None:
    view, _ = attacked(own=5)
    silent = tuple(replace(one, answered_LD=None, gradient_LD=None) for one in view.crossings)
    with pytest.raises(AttackError, match="did not answer"):
        results_of(Knowledge(replace(view, crossings=silent)))
    with pytest.raises(AttackError, match="no gradients cross in inference"):
        gradients_of(Knowledge(replace(view, crossings=silent)))
    view, _ = attacked(own=5, gradients=False)
    with pytest.raises(AttackError, match=r"boundary\.gradients"):
        gradients_of(Knowledge(view))
