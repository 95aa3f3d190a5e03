"""Sensitivity where only a tail of each prompt crosses, narrow, beside a residual path that stays in the silo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.data.tokens import collate
from isthmus.model import adapters
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import train_step
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.features.silo.test_sensitivity_in_use import LITTLE, SENSITIVE, Running, Start, of, start  # noqa: F401
from tests.oracle.conftest import models  # noqa: F401
from tests.oracle.twins import distance

TAIL, LARGE = 3, 1e4
"""So large a noise that the states themselves do not count."""


def crossing_ids(one: Running) -> torch.Tensor:
    """The tokens of the training rows that cross."""
    return torch.tensor([token for row in one.data.train for token in row.input[-row.crossing(TAIL) :]])


@pytest.mark.parametrize("more", [{}, {"width": 6}], ids=["whole", "narrow"])
def test_factors_are_those_of_the_tokens_that_cross(start: Start, more: dict[str, Any]) -> None:  # noqa: F811
    one = start(noise=LARGE, boundary={"tail": TAIL, **more})
    one.optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(40):
        one.train()
    width = more.get("width", 32)
    came = [codec.decode(m.hidden, rows=m.hidden.rows, width=width, codec="fp32") for m in one.tap.take(pb.Forward)]
    drawn, ids_T = torch.cat(came), crossing_ids(one).repeat(40)
    high, low = of(SENSITIVE, ids_T), of(LITTLE, ids_T)
    rest = ~high & ~low
    assert min(int(mask.sum()) for mask in (low, rest)) > 40
    assert drawn[low].std() / drawn[rest].std() == pytest.approx(0.5, rel=0.08)
    assert drawn.square().mean().sqrt() == pytest.approx(LARGE, rel=0.05)  # over what crosses


@pytest.mark.parametrize("more", [{}, {"width": 6}], ids=["whole", "narrow"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_averted_attention_with_tail_and_residual_in_micro_batches(
    start: Start,  # noqa: F811
    family: str,
    more: dict[str, Any],
) -> None:
    """One loss and one gradient, however the rows are cut up; and not those without a shield."""
    boundary = {"tail": TAIL, "residual": True, **more}
    found = []
    for micro_batches, attention in ((1, 4.0), (2, 4.0), (5, 4.0), (1, 0.0)):
        one = start(family, section={"attention": attention}, boundary=boundary)
        one.optimizer.param_groups[0]["lr"] = 0.0
        loss = one.train(micro_batches)
        gradients = {
            name: tensor.grad
            for part in one.silo.model.ends
            for name, tensor in adapters.trainable(part).items()
            if tensor.grad is not None
        }
        assert gradients
        found.append((loss, gradients))
    (loss, gradients), *cut_up, plain = found
    for other, same in cut_up:
        assert other == pytest.approx(loss, rel=1e-5)
        assert same.keys() == gradients.keys()
        assert all(distance(same[name], gradients[name]) < 1e-4 for name in gradients if gradients[name].any())
    assert plain[0] != pytest.approx(loss, rel=1e-4)


@torch.no_grad()
def test_generation_with_a_shield_a_tail_and_a_residual(start: Start) -> None:  # noqa: F811
    """Token by token as a whole pass over the same prompt would say."""
    one = start(section={"attention": 4.0}, boundary={"tail": TAIL, "residual": True, "width": 6})
    prompt = torch.tensor([one.data.train[4].prompt])
    text = one.silo.model.generate(input_ids=prompt, min_new_tokens=8, max_new_tokens=8, do_sample=False)
    answer = text[0, prompt.shape[1] :].tolist()
    labels = torch.full_like(text, -100)
    labels[0, prompt.shape[1] :] = text[0, prompt.shape[1] :]
    logits = one.silo.model(input_ids=text, labels=labels, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
    logits[:, 2] = -torch.inf  # the end of text, which min_new_tokens forbids
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert bool((chosen >= logits.max(dim=1).values - 1e-4).all())


def test_released_once_with_everything_gives_the_same_loss(start: Start) -> None:  # noqa: F811
    boundary = {"tail": TAIL, "residual": True, "width": 6}
    sections: dict[str, Any] = {"lora": {"freeze_bottom": True}, "section": {"attention": 4.0}}
    often, once = start(**sections, boundary=boundary), start(**sections, boundary={**boundary, "release_once": True})
    batch = collate(often.data.train, 0)
    expected = train_step(often.silo.model, often.optimizer, batch).loss
    assert expected is not None
    for step in (train_step, lambda *args: pipelined_step(*args, 2)):
        for group in once.optimizer.param_groups:
            group["lr"] = 0.0
        assert step(once.silo.model, once.optimizer, batch).loss == pytest.approx(expected, rel=1e-5)
    assert len(once.tap.take(pb.Keep)) == len(once.data.train)
