"""The likelihood of a text given what crossed: greatest for the true one, with the slope that it has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from isthmus.attacks.inversion.likelihood import BoundaryLikelihood
from isthmus.attacks.knowledge import Knowledge
from isthmus.errors import AttackError
from tests.unit.attacks.attacked import Attacked


def test_the_true_text_is_the_likeliest(attacked: Attacked) -> None:
    view, truth = attacked(noise=0.05)
    likelihood = BoundaryLikelihood(Knowledge(view))
    assert likelihood.variance == pytest.approx(0.05**2, rel=0.3)
    row = truth[0]
    texts = [tuple(row), *((*row[:-1], token) for token in (11, 22, 33) if token != row[-1])]
    found = likelihood.log_likelihood(likelihood.expected(texts, len(row)), view.crossings[0].hidden_LD.float())
    assert found.argmax() == 0


def test_longer_texts_are_compared_by_their_end(attacked: Attacked) -> None:
    view, truth = attacked()
    likelihood = BoundaryLikelihood(Knowledge(view))
    row = tuple(truth[0])
    whole = likelihood.expected([row], len(row))
    torch.testing.assert_close(likelihood.expected([row], 1), whole[:, -1:])


def test_the_slope_is_by_every_tokens_embedding(attacked: Attacked) -> None:
    view, truth = attacked(noise=0.05)
    slope = BoundaryLikelihood(Knowledge(view)).slope(tuple(truth[0]), view.crossings[0].hidden_LD.float())
    assert slope.shape == (len(truth[0]), 32)
    assert slope.abs().max() > 0


def test_noise_cannot_be_estimated_without_own_rows(attacked: Attacked) -> None:
    view, _ = attacked(own=5)
    with pytest.raises(AttackError, match="pairs"):
        BoundaryLikelihood(Knowledge(replace(view, pairs=())))
