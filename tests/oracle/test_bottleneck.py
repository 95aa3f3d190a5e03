"""A narrow crossing, a residual path, no gradients: held against one autograd graph over the parts, without wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from isthmus.data.tokens import Tokens, collate
from isthmus.model import adapters
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import train_step
from isthmus.wire import isthmus_pb2 as pb
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import Twins, distance

ROWS = [Tokens(list(range(4, 4 + n)), [50 + n, 60 + n, 2][: 1 + n % 3]) for n in (3, 21, 1, 9)]
WIDTH = 6
SECTIONS: dict[str, dict[str, Any]] = {
    "narrow": {"width": WIDTH},
    "residual": {"residual": True},
    "narrow residual": {"width": WIDTH, "residual": True},
    "narrow residual tail": {"width": WIDTH, "residual": True, "tail": 2},
    "residual tail alone": {"residual": True, "tail": 2, "gradients": False},
}
Build = Callable[..., Twins]


@pytest.fixture
def build(twins_of: BuildTwins) -> Build:
    def build(boundary: dict[str, Any], **sections: Any) -> Twins:
        twins = twins_of("llama", (2, 1), sections={"boundary": boundary, **sections})
        draw = torch.Generator().manual_seed(5)
        for part in twins.parts:
            for name, tensor in adapters.adapter_parameters(part).items():
                if name == "boundary_gate.weight":  # beside a bottleneck it starts shut
                    tensor.data.fill_(1.0)
                if name.startswith("boundary_"):
                    tensor.data += 0.1 * torch.randn(tensor.shape, generator=draw)
        return twins

    return build


def slow_logits(twins: Twins, boundary: dict[str, Any], ids: list[int], prompt: int) -> torch.Tensor:
    """Of one row at all of top's positions, ``[T, V]``, by the definition."""
    bottom, trunk, top = twins.parts
    h_TD = bottom.hidden(input_ids=torch.tensor([ids]), use_cache=False)[0]
    first = max(0, prompt - boundary.get("tail", len(ids)))
    x_TD = h_TD[first:]
    if "width" in boundary:
        down_WD, up_DW = (
            adapters.adapter_parameters(part)[name]
            for part, name in ((bottom, "boundary_down.weight"), (trunk, "boundary_up.weight"))
        )
        x_TD = x_TD @ down_WD.T @ up_DW.T
    if not boundary.get("gradients", True):
        x_TD = x_TD.detach()
    out_TD = trunk_blocks(twins, x_TD)
    if boundary.get("residual"):
        gate_D = adapters.adapter_parameters(top)["boundary_gate.weight"]
        added_TD = out_TD - x_TD
        if not boundary.get("gradients", True):
            added_TD = added_TD.detach()
        out_TD = torch.cat([h_TD[:first], h_TD[first:] + gate_D * added_TD])
    return top.model(inputs_embeds=out_TD.unsqueeze(0), use_cache=False).logits[0]


def trunk_blocks(twins: Twins, x_TD: torch.Tensor) -> torch.Tensor:
    """The trunk's blocks alone, by the family's own code."""
    runner = twins.service._runner
    up, residual = runner._up, runner._residual
    runner._up, runner._residual = None, False
    try:
        return runner.full_pass(x_TD, [len(x_TD)])
    finally:
        runner._up, runner._residual = up, residual


def slow_loss(twins: Twins, boundary: dict[str, Any]) -> torch.Tensor:
    losses, count = [], 0
    for row in ROWS:
        logits_TV = slow_logits(twins, boundary, (row.prompt + row.answer)[:-1], len(row.prompt))[-len(row.answer) :]
        losses.append(torch.nn.functional.cross_entropy(logits_TV, torch.tensor(row.answer), reduction="sum"))
        count += len(row.answer)
    return torch.stack(losses).sum() / count


def slow_gradients(twins: Twins, boundary: dict[str, Any]) -> dict[str, torch.Tensor]:
    named = {name: one for part in twins.parts for name, one in adapters.trainable(part).items()}
    found = torch.autograd.grad(slow_loss(twins, boundary), list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("micro_batches", [None, 3])
@pytest.mark.parametrize("name", SECTIONS)
def test_loss_and_gradients(name: str, micro_batches: int | None, build: Build) -> None:
    boundary = SECTIONS[name]
    twins = build(boundary)
    expected, loss = slow_gradients(twins, boundary), float(slow_loss(twins, boundary).detach())
    optimizer = torch.optim.SGD([p for p in twins.split.parameters() if p.requires_grad], lr=0.0)
    batch = collate(ROWS, 0)
    step = (
        train_step(twins.split, optimizer, batch)
        if micro_batches is None
        else pipelined_step(twins.split, optimizer, batch, micro_batches)
    )
    assert step.loss == pytest.approx(loss, rel=1e-5)
    ends = {
        name: one.grad
        for part in twins.split.ends
        for name, one in adapters.trainable(part).items()
        if one.grad is not None
    }
    found = twins.split_gradients() if boundary.get("gradients", True) else ends
    trunk_names = set(adapters.trainable(twins.parts[1]))
    due = {name: one for name, one in expected.items() if boundary.get("gradients", True) or name not in trunk_names}
    assert {name for name, one in found.items() if one is not None} == due.keys()
    for tensor, gradient in due.items():
        assert distance(found[tensor], gradient) < 1e-4, tensor


@torch.no_grad()
@pytest.mark.parametrize("name", SECTIONS)
def test_greedy_generation(name: str, build: Build) -> None:
    twins = build(SECTIONS[name])
    prompts = collate([Tokens(row.prompt, []) for row in ROWS], 0)
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    out_BL = twins.split.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, -6:]
    for row, new_L in zip(ROWS, out_BL.tolist(), strict=True):
        ids = list(row.prompt)
        for token in new_L:
            logits_V = slow_logits(twins, SECTIONS[name], ids, len(row.prompt))[-1]
            logits_V[2] = -torch.inf  # the end of text, which min_new_tokens forbids
            assert logits_V[token] >= logits_V.max() - 1e-4
            ids.append(token)


def test_only_the_projection_crosses_and_no_gradient_where_none_is_wanted(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    boundary = {"width": WIDTH, "residual": True, "gradients": False}
    twins, sent = build(boundary), []
    submit = twins.remote.channel.submit
    monkeypatch.setattr(twins.remote.channel, "submit", lambda request: sent.append(request) or submit(request))
    twins.split(**collate(ROWS, 0).inputs(), use_cache=False).loss.backward()
    (forward,) = sent
    assert isinstance(forward, pb.Forward)
    assert not forward.train
    assert forward.hidden.width == WIDTH


@pytest.mark.parametrize("name", ["narrow residual", "narrow residual tail"])
def test_release_once_with_a_frozen_bottom(name: str, build: Build) -> None:
    twins = build({**SECTIONS[name], "release_once": True}, lora={"freeze_bottom": True})
    loss = float(slow_loss(twins, SECTIONS[name]).detach())
    optimizer = torch.optim.SGD([p for p in twins.split.parameters() if p.requires_grad], lr=0.0)
    for _ in range(2):
        assert train_step(twins.split, optimizer, collate(ROWS, 0)).loss == pytest.approx(loss, rel=1e-5)
    releases = [one for one in twins.boundary.ledger.releases if one.path == "forward"]
    assert len(releases) == len(ROWS)
    assert {one.width for one in releases} == {WIDTH}


@pytest.mark.parametrize("micro_batches", [None, 3])
def test_a_replica_behind_a_narrow_crossing(build: Build, micro_batches: int | None) -> None:
    """A silo's own ``up`` and LoRA get the gradients of the definition (its A is frozen)."""
    boundary = SECTIONS["narrow residual tail"]
    twins = build(boundary, trunk={"adapter": "replica"})
    expected, batch = slow_gradients(twins, boundary), collate(ROWS, 0)
    optimizer = torch.optim.SGD([p for p in twins.split.parameters() if p.requires_grad], lr=0.0)
    if micro_batches is None:
        train_step(twins.split, optimizer, batch)
    else:
        pipelined_step(twins.split, optimizer, batch, micro_batches)
    found = {name: one for name, one in twins.split_gradients().items() if one is not None}
    assert found.keys() == expected.keys()
    assert "boundary_up.weight" in found
    assert not any("lora_A" in name for name in adapters.trainable(twins.parts[1]))
    for name, gradient in expected.items():
        assert distance(found[name], gradient) < 1e-4, name
