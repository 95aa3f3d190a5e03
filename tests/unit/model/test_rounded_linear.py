"""Layers of few bits equal the plain arithmetic that they stand for, and machines without a kernel are refused.

Shapes: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus.errors import NotSupportedError
from isthmus.model import rounded_linear
from isthmus.model.adapters import add_adapter
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.model.rounded_linear import (
    FEW_TOKENS,
    Int4Linear,
    Int8Linear,
    NF4Linear,
    RoundedEmbedding,
    RoundedLinear,
    check_machine,
    kind_of,
    round_weights,
    wide_gradient,
    wide_product,
    wide_type,
)
from isthmus.recipe import LoraSection
from isthmus.silo.join import load_ends
from tests.conftest import make_recipe, needs_bits, save_tiny_model, targets_of

pytestmark = pytest.mark.usefixtures("bitsandbytes")
NF4 = pytest.param(NF4Linear, marks=needs_bits)
KINDS_OF_LAYERS = pytest.mark.parametrize("kind", [Int8Linear, Int4Linear, NF4])
KINDS_OF_WEIGHTS = pytest.mark.parametrize("weights", ["int8", "int4", pytest.param("nf4", marks=needs_bits)])
OUTPUTS = st.integers(1, 12).map(lambda number: 16 * number)
INPUTS = st.integers(1, 6).map(lambda number: 32 * number)
CPU = torch.device("cpu")


def layer_of(kind: type[RoundedLinear], inputs: int, outputs: int, *, bias: bool = True) -> RoundedLinear:
    return kind(nn.Linear(inputs, outputs, bias=bias).requires_grad_(False))


@KINDS_OF_LAYERS
@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(1, 40), n=OUTPUTS, k=INPUTS, bias=st.booleans(), seed=st.integers(0, 9))
def test_a_layer_is_the_plain_arithmetic(
    kind: type[RoundedLinear], tokens: int, n: int, k: int, bias: bool, seed: int
) -> None:
    """Sums in another order may round to the neighbouring number of bfloat16."""
    torch.manual_seed(seed)
    layer, x_TK = layer_of(kind, k, n, bias=bias), torch.randn(tokens, k, requires_grad=True)
    exact_TN = x_TK.to(torch.bfloat16).float() @ layer.weight.T + (0 if layer.bias is None else layer.bias)
    y_TN = layer(x_TK)
    torch.testing.assert_close(
        y_TN[:FEW_TOKENS], exact_TN[:FEW_TOKENS], rtol=2**-7, atol=1e-2 if tokens > FEW_TOKENS else 1e-3
    )
    assert (y_TN - exact_TN).norm() <= 2**-7 * exact_TN.norm()
    gradient_TN = torch.randn(tokens, n)
    found, expected = (torch.autograd.grad(one, x_TK, gradient_TN)[0] for one in (y_TN, x_TK @ layer.weight.T))
    assert (found - expected).norm() <= 2**-7 * expected.norm()


@KINDS_OF_LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_a_wide_type_are_those_of_the_kernel(kind: type[RoundedLinear], dtype: torch.dtype) -> None:
    layer, x_TK, gradient_TN = (
        layer_of(kind, 96, 64, bias=False),
        torch.randn(FEW_TOKENS, 96),
        torch.randn(FEW_TOKENS, 64),
    )
    assert layer.takes(x_TK)
    error = 2**-7 if dtype == torch.bfloat16 else 1e-5
    exact_TN, y_TN = x_TK.to(torch.bfloat16).float() @ layer.weight.T, wide_product(x_TK, layer, dtype)
    assert (y_TN - exact_TN).norm() <= error * exact_TN.norm()
    assert (layer(x_TK) - exact_TN).norm() <= 2**-7 * exact_TN.norm()
    exact_TK, back_TK = gradient_TN @ layer.weight, wide_gradient(gradient_TN, layer, dtype)
    assert (back_TK - exact_TK).norm() <= error * exact_TK.norm()
    assert {y_TN.dtype, back_TK.dtype} == {torch.float32}


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_more_tokens_than_a_kernel_is_made_for_take_wide_weights(
    kind: type[RoundedLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    layer, x_TK = layer_of(kind, 96, 64), torch.randn(FEW_TOKENS + 1, 96)
    expected_TN = wide_product(x_TK, layer, wide_type("cpu"))
    monkeypatch.setattr(kind, "product", refuse)
    assert torch.equal(layer(x_TK), expected_TN + layer.bias)
    with pytest.raises(AssertionError):
        layer(x_TK[:FEW_TOKENS])


def test_the_wide_type_is_one_that_the_processor_is_fast_with(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in (({"avx2": True}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert rounded_linear.wide_type.__wrapped__("cpu") == expected
        assert rounded_linear.wide_type.__wrapped__("cuda") == torch.bfloat16


@KINDS_OF_LAYERS
def test_inputs_may_lie_in_memory_as_they_like_and_be_none(kind: type[RoundedLinear]) -> None:
    layer, x_KT = layer_of(kind, 64, 32), torch.randn(64, 6)
    assert torch.equal(layer(x_KT.T), layer(x_KT.T.contiguous()))
    assert torch.equal(layer(x_KT.T.reshape(2, 3, 64)).reshape(6, 32), layer(x_KT.T))
    assert layer(torch.randn(1, 0, 64)).shape == (1, 0, 32)


def test_weights_of_8_bits_are_off_by_half_a_step_at_most() -> None:
    linear = nn.Linear(64, 32).requires_grad_(False)
    step_N1 = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((Int8Linear(linear).weight - linear.weight).abs() <= step_N1 * 1.01).all()
    linear.weight.zero_()
    assert not Int8Linear(linear).weight.any()


@needs_bits
def test_4_bits_of_normal_float_are_those_of_the_paper() -> None:
    """Each weight is the nearest of 16 quantiles of the normal distribution, times the greatest of its 64 neighbours,
    whose own rounding to 8 bits moves it by a hundredth."""
    quantiles = [-1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0]
    quantiles += [0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0]
    linear = nn.Linear(192, 48).requires_grad_(False)
    weight_NGS = linear.weight.view(48, 3, 64)
    scale_NG1 = weight_NGS.abs().amax(dim=2, keepdim=True)
    nearest_NGS = (weight_NGS[..., None] / scale_NG1[..., None] - torch.tensor(quantiles)).abs().argmin(dim=-1)
    rounded_NGS = torch.tensor(quantiles)[nearest_NGS] * scale_NG1
    off_NGS = (NF4Linear(linear).weight.view(48, 3, 64) - rounded_NGS).abs() / scale_NG1
    assert (off_NGS > 0.02).float().mean() < 0.02  # bfloat16 puts a few on the other side of a boundary


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (Int8Linear, 8 + 16 / 128),
        (Int4Linear, 4.5),
        pytest.param(NF4Linear, 4 + 8 / 64 + 32 / 128 / 64, marks=needs_bits),
    ],
)
def test_a_layer_keeps_nothing_but_its_bits(kind: type[RoundedLinear], bits: float) -> None:
    layer = layer_of(kind, 128, 64, bias=False)
    x_TK = torch.randn(5, 128, requires_grad=True)
    layer(x_TK).sum().backward()
    assert not list(layer.parameters())
    assert sum(one.nbytes for one in layer.buffers()) == bits * 128 * 64 / 8


@KINDS_OF_LAYERS
def test_between_forward_and_backward_no_weights_are_kept(kind: type[RoundedLinear]) -> None:
    saved: list[torch.Tensor] = []
    layer, x_TK = layer_of(kind, 128, 64, bias=False), torch.randn(5, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        y_TN = layer(x_TK)
    assert not saved
    assert vars(y_TN.grad_fn) == {"layer": layer}


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("outputs", [48, 64, 192])
def test_of_a_few_tokens_none_depends_on_the_others(kind: type[RoundedLinear], outputs: int) -> None:
    layer, x_TK = layer_of(kind, 96, outputs), torch.randn(FEW_TOKENS, 96)
    together_TN = layer(x_TK)
    for several in (1, 2, 3, 5, FEW_TOKENS - 1):
        assert torch.equal(torch.cat([layer(one) for one in x_TK.split(several)]), together_TN)


@KINDS_OF_WEIGHTS
@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "phi3"])
def test_the_blocks_are_replaced_and_the_adapters_stay(
    weights: str, family: str, freeze_a: bool, tmp_path: Path
) -> None:
    """Also frozen factors of a rank that a kernel is there for."""
    folder = save_tiny_model(family, tmp_path, intermediate_size=64)
    part = load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk")
    layers = list(part.plain_layers())
    add_adapter(part, LoraSection(rank=32, targets=targets_of(family)), 0, freeze_a=freeze_a)
    added = {name: one.requires_grad for name, one in part.named_parameters() if "lora_" in name}
    linear = {name for name, one in part.named_modules() if type(one) is nn.Linear and "lora_" not in name}
    biases = {name for name, _ in part.named_parameters() if name.endswith(".bias")}
    round_weights(part, layers, weights)
    assert {name: one.requires_grad for name, one in part.named_parameters() if "lora_" in name} == added
    kinds = {name: type(one) for name, one in part.named_modules() if isinstance(one, RoundedLinear)}
    assert set(kinds) == linear
    eights = {name for name, one in kinds.items() if one is Int8Linear}
    assert eights == {name for name in linear if weights == "int8" or "v_proj" in name}
    fours = {kind for kind in kinds.values() if kind is not Int8Linear}
    assert fours == {"int8": set(), "int4": {Int4Linear}, "nf4": {NF4Linear}}[weights]
    assert len(linear) == 3 * {"phi3": 4}.get(family, 7)
    assert {name for name, _ in part.named_parameters() if name.endswith(".bias")} == biases
    assert bool(biases) == (family == "qwen2")


@pytest.mark.parametrize(
    ("weights", "name", "outputs", "inputs", "kind"),
    [
        ("int4", "mlp.up_proj", 48, 96, Int4Linear),
        ("int4", "self_attn.v_proj", 48, 96, Int8Linear),
        ("int4", "mlp.down_proj", 32, 48, Int8Linear),
        ("int4", "mlp.up_proj", 172, 64, Int8Linear),
        ("int8", "mlp.up_proj", 48, 96, Int8Linear),
        ("int8", "mlp.down_proj", 64, 172, None),
        ("nf4", "mlp.up_proj", 172, 64, NF4Linear),
        ("nf4", "self_attn.v_proj", 48, 96, Int8Linear),
        ("nf4", "mlp.down_proj", 32, 48, Int8Linear),
        ("nf4", "mlp.down_proj", 64, 172, None),
    ],
)
def test_values_and_odd_sizes_have_8_bits_and_what_has_no_kernel_stays_whole(
    weights: str, name: str, outputs: int, inputs: int, kind: type[RoundedLinear] | None
) -> None:
    assert kind_of(weights, name, outputs, inputs) is kind


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_embedding_and_head_have_8_bits_and_are_one_if_they_were(family: str, tied: bool, tmp_path: Path) -> None:
    """A vocabulary that is no multiple of what the kernel takes is as good as another."""
    folder = save_tiny_model(family, tmp_path, tie_word_embeddings=tied)
    plain, ends = (load_ends(Checkpoint(str(folder)), make_recipe(folder), CPU, weights) for weights in (None, "int8"))
    (bottom, top), vocabulary = ends, plain[0].config.vocab_size
    assert vocabulary % 16
    embedding, head = bottom.family.embedding_of(bottom.model), top.head
    assert isinstance(embedding, RoundedEmbedding)
    assert isinstance(head, Int8Linear)
    assert (embedding.table is head) == tied
    kept = {one.data_ptr(): one.nbytes for one in (*embedding.buffers(), *head.buffers()) if one.numel() > 1}
    width = bottom.config.hidden_size
    rows = vocabulary + -vocabulary % 16
    assert sum(kept.values()) == (1 if tied else 2) * rows * (width + 2)
    ids = torch.randint(vocabulary, (2, 5))
    whole = plain[0].family.embedding_of(plain[0].model)
    torch.testing.assert_close(embedding(ids), whole(ids), rtol=0.05, atol=0.02 * float(whole(ids).abs().max()))
    whole.weight.data = embedding.weight
    torch.testing.assert_close(embedding(ids), whole(ids))
    assert embedding(ids).shape == (2, 5, width)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (vocabulary, width)
    h_BLD = torch.randn(2, 3, width)
    assert head(h_BLD).shape == (2, 3, vocabulary)
    assert not list(head.parameters())


@KINDS_OF_WEIGHTS
def test_a_silos_blocks_have_few_bits_and_its_adapters_stay(weights: str, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path, intermediate_size=64)
    for part in load_ends(Checkpoint(str(folder)), make_recipe(folder), CPU, weights):
        left = {name for name, one in part.named_modules() if type(one) is nn.Linear and "lora_" not in name}
        assert not left
        assert {one.dtype for name, one in part.named_parameters() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_what_a_machine_lacks_is_refused_by_name(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    check_machine(weights, CPU)
    with pytest.raises(NotSupportedError, match=f'"{weights}" is for processors, and trunk.device is cuda') as caught:
        check_machine(weights, torch.device("cuda"))
    assert 'trunk.weights = "nf4"' in caught.value.remedy
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(NotSupportedError, match=f'"{weights}" needs AVX2.*this x86_64 has default') as caught:
        check_machine(weights, CPU)
    assert "leave trunk.weights out" in caught.value.remedy
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    check_machine(weights, CPU)
    with pytest.raises(NotSupportedError, match=f'silo.weights = "{weights}" is for.*silo.device is cuda') as caught:
        check_machine(weights, torch.device("cuda"), "silo")
    assert caught.value.remedy.endswith("or leave silo.weights out")


@needs_bits
def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_machine("nf4", CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(NotSupportedError, match="takes the package bitsandbytes") as caught:
        check_machine("nf4", CPU)
    assert "pip install 'isthmus[bits]'" in caught.value.remedy


@needs_bits
def test_a_device_that_bitsandbytes_lacks_is_named() -> None:
    with pytest.raises(NotSupportedError, match="bitsandbytes does not compute on meta here"):
        check_machine("nf4", torch.device("meta"))
