"""Only a tail of each prompt crosses: held against the three parts run one row at a time, without padding or wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from isthmus.data.tokens import Batch, Tokens, collate
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import train_step
from isthmus.wire import isthmus_pb2 as pb
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import Twins, distance

ROWS = [Tokens(list(range(4, 4 + n)), [50 + n, 60 + n, 2][: 1 + n % 3]) for n in (3, 21, 1, 9)]
TAIL = 4
Build = Callable[..., Twins]


@pytest.fixture
def build(twins_of: BuildTwins) -> Build:
    def build(family: str, **sections: Any) -> Twins:
        boundary = {"tail": TAIL, **sections.pop("boundary", {})}
        return twins_of(family, (2, 1), sections={"boundary": boundary, **sections})

    return build


def slow_logits(twins: Twins, ids: list[int], prompt: int) -> torch.Tensor:
    """Of the positions that cross, ``[T, V]``."""
    bottom, _, top = twins.parts
    h_TD = bottom.hidden(input_ids=torch.tensor([ids]), use_cache=False)[0, max(0, prompt - TAIL) :]
    g_TD = twins.service._runner.full_pass(h_TD, [len(h_TD)])
    return top.model(inputs_embeds=g_TD.unsqueeze(0), use_cache=False).logits[0]


@torch.no_grad()
def slow_loss(twins: Twins) -> float:
    total, count = 0.0, 0
    for row in ROWS:
        answer = len(row.answer)
        logits_TV = slow_logits(twins, (row.prompt + row.answer)[:-1], len(row.prompt))[-answer:]
        total += float(torch.nn.functional.cross_entropy(logits_TV, torch.tensor(row.answer), reduction="sum"))
        count += answer
    return total / count


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_loss_and_logits(family: str, build: Build) -> None:
    twins, batch = build(family), collate(ROWS, 0)
    output = twins.split(**batch.inputs(), use_cache=False)
    assert float(output.loss) == pytest.approx(slow_loss(twins), rel=1e-5)
    prompts = collate([Tokens(row.prompt, []) for row in ROWS], 0)
    logits_BV = twins.split(**prompts.unsupervised(), use_cache=False).logits[:, -1]
    slow_BV = torch.stack([slow_logits(twins, row.prompt, len(row.prompt))[-1] for row in ROWS])
    assert distance(logits_BV, slow_BV) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_generation_by_one_token_a_trip(family: str, build: Build) -> None:
    twins = build(family)
    prompts = collate([Tokens(row.prompt, []) for row in ROWS], 0)
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    out_BL = twins.split.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)[:, -8:]
    for row, new_L in zip(ROWS, out_BL.tolist(), strict=True):
        ids = list(row.prompt)
        for token in new_L:
            logits_V = slow_logits(twins, ids, len(row.prompt))[-1]
            logits_V[2] = -torch.inf  # the end of text, which min_new_tokens forbids
            assert logits_V[token] >= logits_V.max() - 1e-4
            ids.append(token)


def test_prompt_lookup_gives_the_same_tokens(build: Build) -> None:
    twins = build("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]])
    plain = twins.split.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(twins.split.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4), plain)


@pytest.mark.parametrize("boundary", [{}, {"release_once": True}], ids=["each time", "once"])
def test_micro_batches_and_release_once_have_the_same_loss_and_gradients(boundary: Any, build: Build) -> None:
    twins = build("llama", boundary=boundary, **({"lora": {"freeze_bottom": True}} if boundary else {}))
    found = []
    for take in (train_step, lambda *args: pipelined_step(*args, 3)):
        twins.service._training.forget("a")
        optimizer = torch.optim.SGD([p for p in twins.split.parameters() if p.requires_grad], lr=0.0)
        step = take(twins.split, optimizer, collate(ROWS, 0))
        gradients = twins.split_gradients()
        found.append((step.loss, {name: tensor.clone() for name, tensor in gradients.items()}))
    assert found[0][0] == pytest.approx(slow_loss(twins), rel=1e-5)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        assert distance(found[1][1][name], gradient) < 1e-4, name
    assert any(float(gradient.abs().max()) > 0 for name, gradient in found[0][1].items() if "layers.3" in name)


def test_no_other_position_crosses(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    twins, sent = build("llama"), []
    submit = twins.remote.channel.submit
    monkeypatch.setattr(twins.remote.channel, "submit", lambda request: sent.append(request) or submit(request))
    batch: Batch = collate(ROWS, 0)
    twins.split(**batch.inputs(), use_cache=False).loss.backward()
    twins.split.generate(batch.input_ids[:1, -3:], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    forward, backward, *decodes = sent
    due = [min(TAIL, len(row.prompt)) + len(row.answer) - 1 for row in ROWS]
    assert list(forward.lengths) == due
    assert forward.hidden.rows == backward.gradient.rows == sum(due)
    assert [list(request.lengths) for request in decodes if isinstance(request, pb.Decode)] == [[3], [1]]
