"""Codecs in use: each direction has its own, and the split model learns through all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.errors import FrameError
from isthmus.model.split import SplitForCausalLM
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel
from tests.conftest import Split, make_recipe, save_tiny_model
from tests.oracle.twins import ragged

EACH = {"forward_up": "int8", "forward_down": "bf16", "gradient_up": "fp16", "gradient_down": "int4+zstd"}


class Tap:
    """A channel that keeps what it asked and what was answered."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.crossed: list[Message] = []

    def submit(self, request: Message) -> Answer:
        answer = self._channel.submit(request)
        self.crossed += [request, answer.result()]
        return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def model_of(split: Split, folder: Path, codecs: Any, width: int | None = None) -> SplitForCausalLM:
    boundary = {"codec": codecs} if width is None else {"codec": codecs, "width": width}
    model, _ = split(make_recipe(folder, boundary=boundary), generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model


def gradients(model: SplitForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and all gradients of bottom and top as one row."""
    model.zero_grad()
    loss = model(**ragged("left")).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_each_direction_has_its_codec(split: Split, folder: Path) -> None:
    model = model_of(split, folder, EACH)
    model.trunk.channel = tap = Tap(model.trunk.channel)  # type: ignore[assignment]
    gradients(model)
    forward, hidden, backward, gradient = tap.crossed
    names = [forward.hidden.codec, hidden.hidden.codec, backward.gradient.codec, gradient.gradient.codec]
    assert names == list(EACH.values())


@pytest.mark.parametrize(
    ("name", "loss_off", "gradient_off"),
    [("bf16", 0.01, 0.05), ("fp16", 0.001, 0.01), ("int8", 0.01, 0.05), ("int8+zstd", 0.01, 0.05), ("int4", 0.05, 0.6)],
)
def test_loss_and_gradients_are_near_those_of_fp32(
    name: str, loss_off: float, gradient_off: float, split: Split, folder: Path
) -> None:
    exact_loss, exact = gradients(model_of(split, folder, "fp32"))
    loss, found = gradients(model_of(split, folder, name))
    assert abs(loss / exact_loss - 1) <= loss_off
    assert 0 < (found - exact).norm() / exact.norm() <= gradient_off


@pytest.mark.parametrize("width", [1, 6, 31])
def test_a_narrow_crossing_in_int8_is_near_one_in_fp32(width: int, split: Split, folder: Path) -> None:
    """No multiple of a codec's block, down to a single number a token."""
    exact_loss, exact = gradients(model_of(split, folder, "fp32", width))
    model = model_of(split, folder, "int8", width)
    loss, found = gradients(model)
    assert abs(loss / exact_loss - 1) <= 0.01
    assert 0 < (found - exact).norm() / exact.norm() <= 0.05
    assert model.bottom.model.get_parameter("boundary_down.weight").grad is not None


@pytest.mark.parametrize("width", [None, 6])
def test_generation_through_int8(width: int | None, split: Split, folder: Path) -> None:
    answer = model_of(split, folder, "int8", width).generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert answer.shape == (1, 23)


def test_a_codec_that_the_other_side_does_not_use_is_refused(split: Split, folder: Path) -> None:
    model = model_of(split, folder, "int8")
    fp32 = codec.encode(torch.ones(3, 32), "fp32")
    with pytest.raises(FrameError, match="codec 'fp32', expected 'int8'"):
        model.boundary.decode_reply(fp32, "forward", (3, 32), torch.ones(1))
    with pytest.raises(FrameError, match="codec 'fp32', expected 'int8'"):
        model.trunk.channel.call(pb.Forward(step=1, lengths=[3], hidden=fp32))
