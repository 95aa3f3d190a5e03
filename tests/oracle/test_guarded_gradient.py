"""The guard's terms and their gradients, held against their definitions in one autograd graph, without wire."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from isthmus.data.tokens import Tokens, collate
from isthmus.model import adapters
from isthmus.privacy.dependence import capacity, distance_correlation
from isthmus.silo.defence.guard import Guard
from isthmus.silo.pipeline import pipelined_step
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import Tensors, Twins, distance

ROWS = [Tokens(list(range(4, 4 + n)), [50 + n, 60 + n, 2][: 1 + n % 3]) for n in (3, 21, 1, 9)]
CLIP = 1.5
NOISE = 1e-6
"""So little that the task's own gradient is as without; only capacity is measured by it."""
DEFENCES = {
    1: {"answer": 1.5, "inverter": 0.7, "capacity": 0.3, "correlation": 2.0},
    2: {"capacity": 0.3, "correlation": 2.0},
}
"""By the parts of a step: readers learn between parts, so what they said of the first cannot be asked again."""
BOUNDARIES: dict[str, dict[str, Any]] = {
    "all cross": {"width": 6},
    "residual": {"width": 6, "residual": True},
    "residual alone": {"width": 6, "residual": True, "gradients": False},
    "tail alone": {"width": 6, "residual": True, "gradients": False, "tail": 2},
    "whole states": {"residual": True, "gradients": False},
}


def test_distance_correlation_by_its_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    x_TD, y_TE = torch.randn(7, 3, generator=draw), torch.randn(7, 2, generator=draw)

    def centred(z: torch.Tensor) -> list[list[float]]:
        far = [[float((one - two).norm()) for two in z] for one in z]
        mean = [sum(row) / 7 for row in far]
        return [[far[i][j] - mean[i] - mean[j] + sum(mean) / 7 for j in range(7)] for i in range(7)]

    a, b = centred(x_TD), centred(y_TE)

    def covariance(one: list[list[float]], two: list[list[float]]) -> float:
        return sum(one[i][j] * two[i][j] for i in range(7) for j in range(7)) / 49

    expected = math.sqrt(covariance(a, b) / math.sqrt(covariance(a, a) * covariance(b, b)))
    assert float(distance_correlation(x_TD, y_TE)) == pytest.approx(expected, rel=1e-4)
    assert float(distance_correlation(x_TD, 3 * x_TD + 1)) == pytest.approx(1.0, rel=1e-4)


def test_capacity_is_that_of_parallel_gaussian_channels() -> None:
    z_TW = torch.full((5, 4), 0.5)
    assert float(capacity(z_TW, 0.5)) == pytest.approx(4 * 0.5 * math.log(2))


@pytest.fixture
def overheard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What each of the guard's steps was about: its noise, its questions."""
    heard: list[tuple[Any, ...]] = []
    terms = Guard._terms

    def noting(self: Guard, z_TW: torch.Tensor, clipped_TW: torch.Tensor, *about: Any) -> torch.Tensor:
        heard.append((self._draw.getstate(), *about))
        return terms(self, z_TW, clipped_TW, *about)

    monkeypatch.setattr(Guard, "_terms", noting)
    return heard


def slow_terms(twins: Twins, boundary: dict[str, Any], rows: list[Tokens], about: tuple[Any, ...]) -> torch.Tensor:
    """The guard's terms for these rows, as a function of bottom's parameters."""
    vectors = []
    for row in rows:
        h_TD = twins.split.bottom.hidden(input_ids=torch.tensor([row.input]), use_cache=False)[0]
        h_TD = h_TD[max(0, len(row.prompt) - boundary.get("tail", 99)) :]
        if "width" in boundary:
            h_TD = h_TD @ adapters.adapter_parameters(twins.split.bottom)["boundary_down.weight"].T
        vectors += list(h_TD)
    draw, noise_TW, questions = about
    guard = twins.split.guard
    assert isinstance(guard, Guard)
    guard._draw.setstate(draw)
    z_TW = torch.stack(vectors)
    clipped_TW = torch.stack([one * (CLIP / one.norm()).clamp_max(1.0) for one in vectors])
    return guard._terms(z_TW, clipped_TW, noise_TW, questions)


def gradients_of(twins: Twins) -> Tensors:
    named = {name: one for part in twins.split.ends for name, one in adapters.trainable(part).items()}
    return {name: one.grad.clone() for name, one in named.items() if one.grad is not None}


@pytest.mark.parametrize("parts", DEFENCES)
@pytest.mark.parametrize("name", BOUNDARIES)
def test_its_gradient_is_added_to_the_task_s(
    name: str, parts: int, twins_of: BuildTwins, overheard: list[tuple[Any, ...]]
) -> None:
    boundary: dict[str, Any] = {**BOUNDARIES[name], "forward": {"clip": CLIP, "noise": NOISE}}
    plain = twins_of("llama", (2, 1), sections={"boundary": boundary})
    guarded = twins_of("llama", (2, 1), sections={"boundary": {**boundary, "defence": DEFENCES[parts]}})
    batch, losses = collate(ROWS, 0), []
    for twins in (plain, guarded):
        optimizer = torch.optim.SGD([p for p in twins.split.parameters() if p.requires_grad], lr=0.0)
        losses.append(pipelined_step(twins.split, optimizer, batch, parts).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    before, after = gradients_of(plain), gradients_of(guarded)
    bottom, size = adapters.trainable(guarded.split.bottom), len(ROWS) // parts
    terms = []
    for number, about in enumerate(list(overheard)):
        rows = ROWS[number * size : (number + 1) * size]
        share = sum(len(row.answer) for row in rows) / batch.supervised
        terms.append(share * slow_terms(guarded, boundary, rows, about))
    assert len(terms) == parts
    added = torch.autograd.grad(torch.stack(terms).sum(), list(bottom.values()), allow_unused=True)
    for tensor, gradient in zip(bottom, added, strict=True):
        expected = gradient + before[tensor] if tensor in before else gradient
        assert distance(after[tensor], expected) < 2e-3, tensor
    assert all(distance(after[tensor], before[tensor]) < 1e-3 for tensor in before.keys() - bottom.keys())
