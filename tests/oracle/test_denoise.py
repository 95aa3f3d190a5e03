"""Top is told its silo's noise: held against the parts run by hand on what really crossed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from isthmus.data.tokens import Tokens, collate
from isthmus.model import adapters
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import train_step
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.oracle.conftest import BuildTwins
from tests.oracle.test_bottleneck import trunk_blocks
from tests.oracle.twins import Twins, distance

ROWS = [Tokens(list(range(4, 4 + n)), [50 + n, 60 + n, 2][: 1 + n % 3]) for n in (3, 21, 1, 9)]
CLIP, NOISE = 2.0, 0.3
SECTIONS: dict[str, dict[str, Any]] = {
    "whole states": {},
    "narrow": {"width": 6},
    "narrow residual": {"width": 6, "residual": True},
    "residual alone": {"residual": True, "gradients": False},
    "rounded": {"codec": {"forward_up": "int8"}},
}
LAYER = "boundary_denoise.weight"


@pytest.fixture(params=SECTIONS)
def boundary(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**SECTIONS[request.param], "denoise": True, "forward": {"clip": CLIP, "noise": NOISE}}


@pytest.fixture
def twins(boundary: dict[str, Any], twins_of: BuildTwins) -> Twins:
    built = twins_of("llama", (2, 1), sections={"boundary": boundary})
    layer = adapters.adapter_parameters(built.split.top)[LAYER]
    layer.data = torch.randn(layer.shape, generator=torch.Generator().manual_seed(3))
    if "residual" in boundary:  # beside a bottleneck it starts shut
        adapters.adapter_parameters(built.split.top)["boundary_gate.weight"].data.fill_(0.9)
    return built


@pytest.fixture
def sent(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests to the trunk."""
    requests: list[Any] = []
    submit = twins.remote.channel.submit
    monkeypatch.setattr(twins.remote.channel, "submit", lambda request: requests.append(request) or submit(request))
    return requests


def crossed(requests: list[Any], boundary: dict[str, Any]) -> list[torch.Tensor]:
    """What arrived of each row, from the frames, in order."""
    rows: list[torch.Tensor] = []
    name = boundary.get("codec", {}).get("forward_up", "fp32")
    for request in requests:
        if isinstance(request, pb.Forward | pb.Decode):
            matrix = request.hidden
            z_TW = codec.decode(matrix, rows=matrix.rows, width=matrix.width, codec=name)
            rows += torch.split(z_TW, list(request.lengths))
    return rows


def slow_logits(twins: Twins, boundary: dict[str, Any], ids: list[int], seen_TW: torch.Tensor) -> torch.Tensor:
    """Of one row, by the definition."""
    bottom, trunk, top = twins.parts
    h_TD = bottom.hidden(input_ids=torch.tensor([ids]), use_cache=False)[0]
    z_TW, x_TD = h_TD, seen_TW
    if "width" in boundary:
        z_TW = h_TD @ adapters.adapter_parameters(bottom)["boundary_down.weight"].T
        x_TD = seen_TW @ adapters.adapter_parameters(trunk)["boundary_up.weight"].T
    clipped_TW = torch.stack([one * min(1.0, CLIP / float(one.norm())) for one in z_TW.detach()])
    out_TD = trunk_blocks(twins, x_TD).detach()
    if boundary.get("residual"):
        out_TD = out_TD - x_TD
    out_TD = out_TD - (seen_TW - clipped_TW) @ adapters.adapter_parameters(top)[LAYER].T
    if boundary.get("residual"):
        out_TD = h_TD + adapters.adapter_parameters(top)["boundary_gate.weight"] * out_TD
    return top.model(inputs_embeds=out_TD.unsqueeze(0), use_cache=False).logits[0]


@pytest.mark.parametrize("parts", [None, 2])
def test_loss_and_the_gradient_of_what_is_taken_out(
    parts: int | None, twins: Twins, boundary: dict[str, Any], sent: list[Any]
) -> None:
    optimizer = torch.optim.SGD([p for p in twins.split.parameters() if p.requires_grad], lr=0.0)
    batch = collate(ROWS, 0)
    step = (
        train_step(twins.split, optimizer, batch)
        if parts is None
        else pipelined_step(twins.split, optimizer, batch, parts)
    )
    losses = []
    for row, seen_TW in zip(ROWS, crossed(sent, boundary), strict=True):
        logits_TV = slow_logits(twins, boundary, row.input, seen_TW)[-len(row.answer) :]
        losses.append(cross_entropy(logits_TV, torch.tensor(row.answer), reduction="sum"))
    loss = torch.stack(losses).sum() / batch.supervised
    layer = adapters.adapter_parameters(twins.split.top)[LAYER]
    (expected,) = torch.autograd.grad(loss, [layer])
    assert step.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    assert layer.grad is not None
    assert distance(layer.grad, expected) < 1e-3


@torch.no_grad()
def test_greedy_generation(twins: Twins, boundary: dict[str, Any], sent: list[Any]) -> None:
    prompt = ROWS[1].prompt
    ids_BL = torch.tensor([prompt])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids = twins.split.generate(ids_BL, attention_mask=torch.ones_like(ids_BL), **settings)[0].tolist()
    logits_TV = slow_logits(twins, boundary, ids[:-1], torch.cat(crossed(sent, boundary)))[len(prompt) - 1 :]
    logits_TV[:, 2] = -torch.inf  # the end of text, which min_new_tokens forbids
    for token, logits_V in zip(ids[len(prompt) :], logits_TV, strict=True):
        assert logits_V[token] >= logits_V.max() - 1e-3
