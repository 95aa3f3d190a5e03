"""Layers in 8 bits equal the plain arithmetic that they stand for, and machines without a kernel are refused.

Shapes: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus.errors import NotSupportedError
from isthmus.model.adapters import add_adapter
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.recipe import LoraSection
from isthmus.trunk.int8_weights import MULTIPLE, Int8Linear, check_machine, keep_in_int8
from tests.conftest import save_tiny_model

SIZES = st.integers(1, 12).map(lambda number: 16 * number)
CPU = torch.device("cpu")


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(1, 40), n=SIZES, k=SIZES, bias=st.booleans(), seed=st.integers(0, 9))
def test_a_layer_is_the_plain_arithmetic(tokens: int, n: int, k: int, bias: bool, seed: int) -> None:
    """Sums in another order may round to the neighbouring number of bfloat16."""
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias=bias).requires_grad_(False)
    layer, x_TK = Int8Linear(linear), torch.randn(tokens, k, requires_grad=True)
    exact_TN = x_TK.to(torch.bfloat16).float() @ layer.weight.T + (0 if linear.bias is None else linear.bias)
    y_TN = layer(x_TK)
    torch.testing.assert_close(y_TN, exact_TN, rtol=2**-7, atol=1e-3)
    gradient_TN = torch.randn(tokens, n)
    found, expected = (torch.autograd.grad(one, x_TK, gradient_TN)[0] for one in (y_TN, x_TK @ layer.weight.T))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weights_are_off_by_half_a_step_at_most() -> None:
    linear = nn.Linear(64, 32).requires_grad_(False)
    step_N1 = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((Int8Linear(linear).weight - linear.weight).abs() <= step_N1 * 1.01).all()
    linear.weight.zero_()
    assert not Int8Linear(linear).weight.any()


def test_a_tokens_result_does_not_depend_on_the_others() -> None:
    layer, x_TK = Int8Linear(nn.Linear(96, 48).requires_grad_(False)), torch.randn(37, 96)
    together_TN = layer(x_TK)
    assert all(torch.equal(layer(x_TK[row : row + 1]), together_TN[row : row + 1]) for row in range(37))


@pytest.mark.parametrize("freeze_a", [False, True])
def test_the_blocks_are_replaced_and_the_adapters_stay(freeze_a: bool, tmp_path: Path) -> None:
    """Also frozen factors of a rank that a kernel is there for."""
    part = load_part(Checkpoint(str(save_tiny_model("llama", tmp_path))), Cut(1, 1), "trunk")
    add_adapter(part, LoraSection(rank=MULTIPLE), 0, freeze_a=freeze_a)
    added = {name: one.requires_grad for name, one in part.named_parameters() if "lora_" in name}
    keep_in_int8(part)
    assert {name: one.requires_grad for name, one in part.named_parameters() if "lora_" in name} == added
    plain = [name for name, one in part.model.named_modules() if type(one) is nn.Linear]
    assert plain
    assert all("lora_" in name for name in plain)
    assert sum(isinstance(one, Int8Linear) for one in part.modules()) == 3 * 7


def test_what_a_machine_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    check_machine(CPU)
    with pytest.raises(NotSupportedError, match="device is cuda"):
        check_machine(torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(NotSupportedError, match="this x86_64 has default") as caught:
        check_machine(CPU)
    assert "leave trunk.weights out" in caught.value.remedy
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    check_machine(CPU)
