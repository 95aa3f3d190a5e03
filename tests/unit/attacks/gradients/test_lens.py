"""Top's Jacobian, and the gradient worked out with it, against plain autograd."""

from __future__ import annotations

import pytest
import torch

from isthmus.attacks.gradients.lens import Lens, clipped
from tests.oracle.twins import FAMILIES, distance
from tests.unit.attacks.conftest import PartsOf
from tests.unit.attacks.victims import secured, step

PROMPT, ANSWER = [5, 60, 17, 33, 8], [71, 12, 40]
AT_S = torch.arange(4, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_what_autograd_sends(parts_of: PartsOf, family: str) -> None:
    parts = parts_of(family)
    seen = step(parts, PROMPT, ANSWER, weight=7)
    lens = Lens(parts.top, seen.g_LD)
    assert distance(lens.gradient(AT_S, torch.tensor(ANSWER), 7), seen.e_LD) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_push_and_pull_are_transposes_and_the_derivative(parts_of: PartsOf, family: str) -> None:
    parts = parts_of(family)
    g_LD = step(parts, PROMPT, ANSWER, weight=1).g_LD
    lens = Lens(parts.top, g_LD)
    draw = torch.Generator().manual_seed(1)
    r_LD, u_LD = (torch.randn(g_LD.shape, generator=draw) for _ in range(2))
    assert float((lens.push(r_LD) * u_LD).sum()) == pytest.approx(float((r_LD * lens.pull(u_LD)).sum()), rel=1e-3)
    tiny = 1e-3
    with torch.no_grad():
        moved = [
            parts.top.hidden(inputs_embeds=(g_LD + side * tiny * r_LD)[None], use_cache=False)[0] for side in (1, -1)
        ]
    assert distance(lens.push(r_LD), (moved[0] - moved[1]) / (2 * tiny)) < 1e-2


def test_logits_are_top_s(parts_of: PartsOf) -> None:
    for family in ("llama", "gemma2"):
        parts = parts_of(family)
        g_LD = step(parts, PROMPT, ANSWER, weight=1).g_LD
        with torch.no_grad():
            whole = parts.top.model(inputs_embeds=g_LD[None], use_cache=False).logits[0]
        assert distance(Lens(parts.top, g_LD).logits(AT_S), whole[AT_S]) < 1e-5


def test_clipping_is_the_boundary_s() -> None:
    e_LD = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    e_LD[2] = 0
    assert torch.allclose(clipped(e_LD, 1.5), secured(e_LD, 1.5, 0.0, torch.Generator()))
    assert torch.equal(clipped(e_LD, 0.0), e_LD)
