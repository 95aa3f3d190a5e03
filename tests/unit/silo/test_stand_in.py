"""The stand-in: a step of the optimizer that holds it is the trunk's; what the trunk cannot follow is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import NotSupportedError, ProtocolError
from isthmus.model import adapters
from tests.conftest import Split, make_recipe, save_tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])
NOISED = {"boundary": {"forward": {"clip": 1.0, "noise": 0.1}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def backward(model: Any) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tensors(model: Any, service: Any) -> dict[str, torch.Tensor]:
    parts = (model.bottom, service._runner.part, model.top)
    return {name: tensor for part in parts for name, tensor in adapters.adapter_of(part).items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The blocks that changed."""
    return {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}


def test_its_gradient_has_the_norm_of_the_trunks(folder: Path, split: Split) -> None:
    model, service = split(make_recipe(folder))
    for _ in range(2):
        backward(model)
        gradients = service._training._silos["a"].gradients
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert model.trunk.stand_in.lora.grad.norm() == pytest.approx(float(norm), rel=1e-5)


def test_an_optimizer_of_the_whole_model_steps_the_trunk_and_a_frozen_one_stays(folder: Path, split: Split) -> None:
    model, service = split(make_recipe(folder))
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    before = tensors(model, service)
    backward(model)
    optimizer.step()
    assert changed(before, tensors(model, service)) == {"0", "1", "2", "3", "4"}
    model.trunk.requires_grad_(False)
    before = tensors(model, service)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert changed(before, tensors(model, service)) == {"0", "4"}
    assert service._training._silos["a"].gradients is not None, "of the first backward"


def test_ends_that_change_without_the_trunk_are_an_error(folder: Path, split: Split) -> None:
    model, _ = split(make_recipe(folder))
    optimizer = torch.optim.SGD([one for part in model.ends for one in adapters.trainable(part).values()], lr=0.1)
    backward(model)
    backward(model)  # accumulated
    optimizer.step()
    with pytest.raises(ProtocolError, match="the trunk was not stepped") as refused, torch.no_grad():
        model(input_ids=IDS)
    assert "all parameters of the model" in refused.value.remedy
    optimizer.step()
    with pytest.raises(ProtocolError, match="the trunk was not stepped"):
        backward(model) or optimizer.step() or model.save_pretrained(folder / "never")


def test_what_the_trunk_cannot_follow_is_refused_before_anything_changes(folder: Path, split: Split) -> None:
    model, service = split(make_recipe(folder))
    backward(model)
    before = tensors(model, service)
    with pytest.raises(NotSupportedError, match="RMSprop"):
        torch.optim.RMSprop(trained(model)).step()
    assert not changed(before, tensors(model, service))
    torch.nn.utils.clip_grad_value_(trained(model), 1e-3)
    with pytest.raises(NotSupportedError, match="common factor") as refused:
        torch.optim.SGD(trained(model), lr=0.1).step()
    assert "max_grad_norm" in refused.value.remedy


def test_gradients_that_were_made_larger_are_refused(folder: Path, split: Split) -> None:
    model, _ = split(make_recipe(folder))
    for factor in (2.0, -1.0):
        backward(model)
        for one in trained(model):
            one.grad = factor * one.grad
        with pytest.raises(NotSupportedError, match=f"multiplied by {factor:g}") as refused:
            torch.optim.SGD(trained(model), lr=0.1).step()
        assert "the loss" in refused.value.remedy
        model.zero_grad()


@pytest.mark.parametrize("lora", ["plain", "frozen-a"])
def test_rates_of_their_own_for_a_and_b_are_refused(lora: str, folder: Path, split: Split) -> None:
    """LoRA+, as peft builds it: A's group is empty where the ends train B alone. Rates by part are the caller's."""
    model, _ = split(make_recipe(folder, federation={"lora": lora}))
    backward(model)
    of_b = [one for name, one in model.named_parameters() if one.requires_grad and "lora_A" not in name]
    of_a = [one for name, one in model.named_parameters() if one.requires_grad and "lora_A" in name]
    assert bool(of_a) == (lora == "plain")
    with pytest.raises(NotSupportedError, match=r"LoRA\+"):
        torch.optim.SGD([{"params": of_a, "lr": 0.01}, {"params": of_b, "lr": 0.16}]).step()
    torch.optim.SGD([{"params": model.trunk.parameters()}, {"params": trained(model.top), "lr": 0.1}], lr=0.2).step()


@pytest.mark.parametrize("kind", ["lora_A", "v_proj"])
def test_freezing_a_kind_of_tensors_is_refused(kind: str, folder: Path, split: Split) -> None:
    """The uncut model's middle blocks would be frozen, too. To freeze bottom is the caller's choice."""
    model, _ = split(make_recipe(folder, federation={"lora": "plain"}))
    model.bottom.requires_grad_(False)
    backward(model)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if kind in name:
            parameter.requires_grad_(False)
    backward(model)
    with pytest.raises(NotSupportedError, match=f"{kind}.* were frozen, and the trunk's train on"):
        optimizer.step()


def test_gradients_set_by_hand_are_refused_where_the_trunk_s_is_left_out(folder: Path, split: Split) -> None:
    """torch.autograd.grad gives the silo's gradients alone."""
    model, _ = split(make_recipe(folder))
    loss = model(input_ids=IDS, labels=IDS).loss
    found = torch.autograd.grad(loss, trained(model), allow_unused=True)
    for parameter, gradient in zip(trained(model), found, strict=True):
        parameter.grad = gradient
    with pytest.raises(NotSupportedError, match="set by hand"):
        torch.optim.SGD(trained(model), lr=0.1).step()


def test_the_factor_of_clipped_gradients_does_not_cross_where_noise_is_added(
    folder: Path, split: Split, caplog: pytest.LogCaptureFixture
) -> None:
    model, service = split(make_recipe(folder, **NOISED))
    sent = []
    follow = service._training.follow
    service._training.follow = lambda contributions, settings: (
        sent.append(contributions),
        follow(contributions, settings),
    )
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            backward(model)
            torch.nn.utils.clip_grad_norm_(trained(model), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
    assert sent == [{"a": (4.0, 1.0)}] * 2
    assert sum("clipped in bottom and top" in message for message in caplog.messages) == 1


def test_rounds_by_hand_are_left_to_the_caller(folder: Path, split: Split) -> None:
    model, service = split(make_recipe(folder))
    model.trunk.rounds.begin(1, ["a"])
    backward(model)
    before = tensors(model, service)
    torch.optim.RMSprop(trained(model)).step()
    assert changed(before, tensors(model, service)) == {"0", "4"}
    model.trunk.rounds.commit(1, 1, 4.0)
    assert changed(before, tensors(model, service)) == {"0", "1", "2", "3", "4"}
    with pytest.raises(NotSupportedError, match="begun by hand"):
        model.load_state_dict(model.state_dict())


def test_without_gradients_there_is_nothing_to_step(folder: Path, split: Split) -> None:
    model, service = split(make_recipe(folder, boundary={"gradients": False}, lora={"freeze_bottom": True}))
    backward(model)
    torch.optim.SGD(trained(model), lr=0.1).step()
    assert service._training._round == 0
