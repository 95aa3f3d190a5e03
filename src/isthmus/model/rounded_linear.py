"""Layers with weights of few bits: a part of the model is smaller, and on a processor a token takes less time, which is
that of reading them.

Inputs are rounded to bfloat16, products summed in fp32, results rounded to bfloat16. Of a few tokens the kernels of few
bits compute each as if it came alone. Of more tokens, and in the backward, a layer's weights come into a wide type for
the product, and a token's result depends on the others by rounding. Adapters on top train in fp32.

Shapes: T tokens, N rows of a weight (outputs), K its columns (inputs), G groups of a row, P bytes with two numbers.
"""

from __future__ import annotations

import platform
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from isthmus.errors import NotSupportedError
from isthmus.model import int4_groups
from isthmus.model.cut import Part, move
from isthmus.model.device import CPU

VALUES = "v_proj"
"""The last part of the names of projections to an attention's values."""
FEW_TOKENS = 16
"""Most tokens that the kernels of few bits take: their time grows with the tokens, from about as many on beyond that of
a product with wide weights."""
BITSANDBYTES = "nf4"
"""The kind of weights that takes the package bitsandbytes."""
ROWS, ROWS_AT_ONCE = 16, 8192
"""The kernel of 8 bits takes multiples of so many rows; so many are rounded, or made wide, at once, since a head has
some hundred thousand."""


class RoundedLinear(nn.Module):
    """A frozen linear layer with the weights of another, rounded.

    Args:
        linear: the layer, of a size that fits; its weight is not kept.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias

    @staticmethod
    @abstractmethod
    def fits(outputs: int, inputs: int) -> bool:
        """Whether the kernel takes layers of this size."""

    @property
    @abstractmethod
    def weight(self) -> torch.Tensor:
        """The weights that it computes with, ``[N, K]``, fp32: a copy."""

    @abstractmethod
    def takes(self, x_TK: torch.Tensor) -> bool:
        """Whether its kernel computes the product of these inputs."""

    @abstractmethod
    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Inputs times weights by its kernel, ``[T, N]``, both in bfloat16; without gradient."""

    def wide(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        """The weights for one product, some rows at a time: which, ``[rows, K]``, and what each output is scaled by
        behind it, ``[rows]``; None: by nothing."""
        yield slice(0, self.out_features), self.weight.to(dtype), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's result, ``[…, N]``, in the type of ``x``, ``[…, K]``."""
        if x.requires_grad and torch.is_grad_enabled():
            y: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            y = _product(x, self)
        return y if self.bias is None else y + self.bias


class Int8Linear(RoundedLinear):
    """Weights of 8 bits: whole numbers from -127 to 127, and a scale for each row. Rows of zeros fill them up to what
    the kernel takes."""

    weight_NK: torch.Tensor
    scale_N: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        rows = self.out_features + -self.out_features % ROWS
        device = linear.weight.device
        self.register_buffer(
            "weight_NK", torch.zeros(rows, self.in_features, dtype=torch.int8, device=device), persistent=False
        )
        self.register_buffer("scale_N", torch.ones(rows, dtype=torch.bfloat16, device=device), persistent=False)
        for start in range(0, self.out_features, ROWS_AT_ONCE):
            weight_RK = linear.weight.detach()[start : start + ROWS_AT_ONCE].float()
            scale_R = (weight_RK.abs().amax(dim=1) / 127).to(torch.bfloat16)
            scale_R[scale_R == 0] = 1.0
            own = slice(start, start + len(weight_RK))
            self.weight_NK[own] = (weight_RK / scale_R.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
            self.scale_N[own] = scale_R

    @staticmethod
    def fits(outputs: int, inputs: int) -> bool:
        return inputs % 16 == 0

    @property
    def weight(self) -> torch.Tensor:
        return (self.weight_NK.float() * self.scale_N.float()[:, None])[: self.out_features]

    def takes(self, x_TK: torch.Tensor) -> bool:
        return x_TK.device.type == "cpu" and len(x_TK) <= FEW_TOKENS

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(x_TK, self.weight_NK, self.scale_N)[:, : self.out_features]

    def wide(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        for start in range(0, self.out_features, ROWS_AT_ONCE):
            own = slice(start, min(start + ROWS_AT_ONCE, self.out_features))
            yield own, self.weight_NK[own].to(dtype), self.scale_N[own]


class RoundedEmbedding(nn.Module):
    """A frozen embedding with weights of 8 bits, which a head may share.

    Args:
        embedding: the one whose place it takes.
        table: its weights; of a tied model, the head itself.
    """

    embed_scale: torch.Tensor | None

    def __init__(self, embedding: nn.Embedding, table: Int8Linear) -> None:
        super().__init__()
        self.table, self._dtype = table, embedding.weight.dtype
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        scale = getattr(embedding, "embed_scale", None)  # Gemma's embeddings are scaled
        self.register_buffer("embed_scale", scale, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The weights, ``[vocabulary, width]``, fp32: a copy."""
        return self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings ``[…, width]`` of token ids ``[…]``."""
        rows = self.table.weight_NK[ids].to(self._dtype) * self.table.scale_N[ids].to(self._dtype)[..., None]
        return rows if self.embed_scale is None else rows * self.embed_scale.to(self._dtype)


class Int4Linear(RoundedLinear):
    """Weights of 4 bits, and a scale and a zero for each group of a row (see ``int4_groups``)."""

    packed_NH: torch.Tensor
    scale_zero_GN2: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        packed_NH, scale_zero_GN2 = int4_groups.quantize(linear.weight.detach())
        self.register_buffer("packed_NH", packed_NH, persistent=False)
        self.register_buffer("scale_zero_GN2", scale_zero_GN2, persistent=False)

    @staticmethod
    def fits(outputs: int, inputs: int) -> bool:
        return outputs % int4_groups.ROWS == 0 and int4_groups.group_size(inputs) > 0

    @property
    def weight(self) -> torch.Tensor:
        return int4_groups.dequantize(self.packed_NH, self.scale_zero_GN2)

    def takes(self, x_TK: torch.Tensor) -> bool:
        return len(x_TK) <= FEW_TOKENS

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        size = int4_groups.group_size(self.in_features)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_TK, self.packed_NH, size, self.scale_zero_GN2)  # type: ignore[no-any-return]


class NF4Linear(RoundedLinear):
    """Weights of 4 bits of NormalFloat, a scale for each 64 neighbours of a row (32, where 64 does not divide it), and
    scales of 8 bits: 4.13 bits a weight. QLoRA (arXiv 2305.14314), by bitsandbytes, on the device of the weight."""

    packed_P1: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight_NK = linear.weight.detach().to(torch.bfloat16)
        packed_P1, self._scales = _bitsandbytes().functional.quantize_4bit(
            weight_NK, blocksize=int4_groups.group_size(linear.in_features), compress_statistics=True, quant_type="nf4"
        )
        self.register_buffer("packed_P1", packed_P1, persistent=False)
        self.register_buffer("scales", self._scales.absmax, persistent=False)
        self.register_buffer("scales_of_scales", self._scales.state2.absmax, persistent=False)

    @staticmethod
    def fits(outputs: int, inputs: int) -> bool:
        return int4_groups.group_size(inputs) > 0

    @property
    def weight(self) -> torch.Tensor:
        weight_NK: torch.Tensor = _bitsandbytes().functional.dequantize_4bit(self.packed_P1, self._scales)
        return weight_NK.float()

    def takes(self, x_TK: torch.Tensor) -> bool:
        return True

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        y_TN: torch.Tensor = _bitsandbytes().matmul_4bit(x_TK, self.packed_P1, self._scales)
        return y_TN


def kind_of(weights: str, name: str, outputs: int, inputs: int) -> type[RoundedLinear] | None:
    """The class of layer that replaces a linear layer of this size; None: it stays whole.

    With 4 bits the projections to values have 8: rounding harms them most, and they are small where several heads of
    queries share one of values. So have layers whose rows are no multiples of a group.

    Args:
        weights: the kind of weights, as ``trunk.weights`` has it.
        name: the layer's.
    """
    kinds: dict[str, type[RoundedLinear]] = {"int4": Int4Linear, BITSANDBYTES: NF4Linear}
    four = kinds.get(weights)
    if four is not None and not name.endswith(VALUES) and four.fits(outputs, inputs):
        return four
    return Int8Linear if Int8Linear.fits(outputs, inputs) else None


def check_machine(weights: str, device: torch.device, owner: str = "trunk") -> None:
    """Refuse weights of few bits where no kernel is there for them.

    Args:
        weights: the kind, as ``trunk.weights`` has it.
        owner: the recipe's table that asks for them.

    Raises:
        NotSupportedError: the device is no processor, or the processor lacks the instructions; of "nf4", bitsandbytes
            is not installed, or does not compute on the device.
    """
    asked, remedy = f'{owner}.weights = "{weights}"', _remedy(owner)
    if weights == BITSANDBYTES:
        _try_bitsandbytes(device, asked, remedy)
        return
    if device.type != "cpu":
        raise NotSupportedError(
            f"{asked} is for processors, and {owner}.device is {device.type}",
            remedy=f'take {owner}.weights = "nf4", which is 4 bits on accelerators; or {remedy}',
        )
    capability, machine = torch.backends.cpu.get_cpu_capability(), platform.machine()
    if capability not in ("AVX2", "AVX512") and machine not in ("aarch64", "arm64"):
        raise NotSupportedError(
            f"{asked} needs AVX2, AVX-512 or an ARM processor; this {machine} has {capability.lower()}",
            remedy=remedy,
        )


def round_weights(part: Part, layers: Iterable[str], weights: str, device: torch.device = CPU) -> None:
    """Replace those of these layers of a part that fit, in place; adapters on them stay as they are. The part comes to
    the device one layer after another, so that it never is there whole.

    Args:
        layers: ``Part.plain_layers`` of the part before it had adapters.
        weights: the kind, as ``trunk.weights`` has it.
    """
    for name in layers:
        part.replace_layer(name, partial(_rounded, name, weights, device))
    move(part, device)


def round_table(bottom: Part, top: Part, device: torch.device = CPU) -> None:
    """Replace a silo's embedding and head, in place, by ones of 8 bits on the device; tied ones keep one copy. An
    adapter on the head stays as it is."""
    embedding = bottom.family.embedding_of(bottom.model)
    assert isinstance(embedding, nn.Embedding)
    if not Int8Linear.fits(*embedding.weight.shape):
        return
    made: list[Int8Linear] = []

    def rounded(head: nn.Linear) -> nn.Module:
        tied = head.weight is embedding.weight
        table = Int8Linear(head.to(device))
        if tied:
            made.append(table)
        return table

    embedding.to(device)
    top.replace_layer(top.family.head, rounded)
    if not made:
        as_layer = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
        as_layer.weight = embedding.weight
        made.append(Int8Linear(as_layer))
    setattr(bottom.family.backbone_of(bottom.model), bottom.family.embedding, RoundedEmbedding(embedding, made[0]))


def _rounded(name: str, weights: str, device: torch.device, layer: nn.Linear) -> nn.Module:
    kind = kind_of(weights, name, *layer.weight.shape)
    return layer if kind is None else kind(layer.to(device))


def _remedy(owner: str) -> str:
    if owner == "trunk":
        return 'leave trunk.weights out; trunk.dtype = "bfloat16" halves the weights on any machine'
    return f"leave {owner}.weights out"


def _bitsandbytes() -> Any:
    """The package, which takes a second to import."""
    import bitsandbytes

    return bitsandbytes


def _try_bitsandbytes(device: torch.device, asked: str, remedy: str) -> None:
    """Let it round a small layer on the device and multiply.

    Raises:
        NotSupportedError: it cannot.
    """
    try:
        _bitsandbytes()
    except ImportError as error:
        raise NotSupportedError(
            f"{asked} takes the package bitsandbytes, which is not installed",
            remedy=f"install it with: pip install 'isthmus[bits]'; or {remedy}",
        ) from error
    try:
        layer = NF4Linear(nn.Linear(64, 16, device=device).requires_grad_(False))
        layer(torch.ones(1, 64, device=device)).tolist()
    except (RuntimeError, NotImplementedError, OSError, AttributeError) as error:
        raise NotSupportedError(
            f"{asked}: bitsandbytes does not compute on {device} here: {error}",
            remedy=f"install a bitsandbytes that has this device ('python -m bitsandbytes' tells); or {remedy}",
        ) from error


@cache
def wide_type(device: str) -> torch.dtype:
    """The type of weights for one product on this kind of device: bfloat16, but fp32 on a processor that computes
    with it no faster."""
    fast: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # earlier versions of torch do not tell
    slow = device == "cpu" and not (fast.get("avx512_bf16") or fast.get("amx_bf16"))
    return torch.float32 if slow else torch.bfloat16


def wide_product(x_TK: torch.Tensor, layer: RoundedLinear, dtype: torch.dtype) -> torch.Tensor:
    """Inputs times a layer's weights in this type, ``[T, N]``, in the type of the inputs."""
    rounded_TK = x_TK.to(torch.bfloat16).to(dtype)
    y_TN = x_TK.new_empty(len(x_TK), layer.out_features)
    for rows, weight_RK, scale_R in layer.wide(dtype):
        y_TN[:, rows] = nn.functional.linear(rounded_TK, weight_RK)
        if scale_R is not None:
            y_TN[:, rows] *= scale_R
    return y_TN


def wide_gradient(gradient_TN: torch.Tensor, layer: RoundedLinear, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of a layer's inputs with its weights in this type, ``[T, K]``, in the type of the outputs'."""
    x_TK = gradient_TN.new_zeros(len(gradient_TN), layer.in_features)
    for rows, weight_RK, scale_R in layer.wide(dtype):
        own_TR = gradient_TN[:, rows]
        x_TK += (own_TR if scale_R is None else own_TR * scale_R).to(dtype) @ weight_RK
    return x_TK


def _product(x: torch.Tensor, layer: RoundedLinear) -> torch.Tensor:
    x_TK = x.reshape(-1, x.shape[-1])
    if layer.takes(x_TK):
        y_TN = layer.product(x_TK.to(torch.bfloat16).contiguous()).to(x.dtype)
    else:
        y_TN = wide_product(x_TK, layer, wide_type(x.device.type))
    return y_TN.view(*x.shape[:-1], layer.out_features)


class _Product(torch.autograd.Function):
    """Inputs times weights. Nothing is kept for the backward but the layer; the weights have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: RoundedLinear) -> torch.Tensor:
        ctx.layer = layer
        return _product(x, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient_TN = gradient.reshape(-1, gradient.shape[-1])
        x_TK = wide_gradient(gradient_TN, ctx.layer, wide_type(gradient.device.type))
        return x_TK.view(*gradient.shape[:-1], ctx.layer.in_features), None
