"""Linear layers of the trunk with weights of few bits: it is smaller, and on a processor a token takes less time, which
is that of reading them.

Inputs are rounded to bfloat16, products summed in fp32, results rounded to bfloat16. A token's result does not depend
on the others of a pass, but for rounding in "nf4". Adapters on top train in fp32.

Shapes: T tokens, N rows of a weight (outputs), K its columns (inputs), G groups of a row, P bytes with two numbers.
"""

from __future__ import annotations

import platform
from abc import abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from isthmus.errors import NotSupportedError
from isthmus.model.cut import Part
from isthmus.model.device import CPU
from isthmus.trunk import int4_groups

VALUES = "v_proj"
"""The last part of the names of projections to an attention's values."""
BITSANDBYTES = "nf4"
"""The kind of weights that takes the package bitsandbytes."""
_REMEDY = 'leave trunk.weights out; trunk.dtype = "bfloat16" halves the weights on any machine'


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
    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Inputs times weights, ``[T, N]``, both in bfloat16; without gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's result, ``[…, N]``, in the type of ``x``, ``[…, K]``."""
        if x.requires_grad and torch.is_grad_enabled():
            y: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            y = _product(x, self)
        return y if self.bias is None else y + self.bias


class Int8Linear(RoundedLinear):
    """Weights of 8 bits: whole numbers from -127 to 127, and a scale for each row."""

    weight_NK: torch.Tensor
    scale_N: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight_NK = linear.weight.detach().float()
        scale_N = (weight_NK.abs().amax(dim=1) / 127).to(torch.bfloat16)
        scale_N[scale_N == 0] = 1.0
        whole_NK = (weight_NK / scale_N.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("weight_NK", whole_NK, persistent=False)
        self.register_buffer("scale_N", scale_N, persistent=False)

    @staticmethod
    def fits(outputs: int, inputs: int) -> bool:
        return outputs % 16 == 0 and inputs % 16 == 0

    @property
    def weight(self) -> torch.Tensor:
        return self.weight_NK.float().mul_(self.scale_N.float()[:, None])

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        if x_TK.device.type == "cpu":
            return torch._weight_int8pack_mm(x_TK, self.weight_NK, self.scale_N)
        return self.plain_product(x_TK)

    def plain_product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """The product where torch has no kernel for it: weights come into bfloat16 for each."""
        return nn.functional.linear(x_TK, self.weight_NK.to(torch.bfloat16)) * self.scale_N


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


def check_machine(weights: str, device: torch.device) -> None:
    """Refuse weights of few bits where no kernel is there for them.

    Args:
        weights: the kind, as ``trunk.weights`` has it.

    Raises:
        NotSupportedError: the device is no processor, or the processor lacks the instructions; of "nf4", bitsandbytes
            is not installed, or does not compute on the device.
    """
    if weights == BITSANDBYTES:
        _try_bitsandbytes(device)
        return
    if device.type != "cpu":
        raise NotSupportedError(
            f'trunk.weights = "{weights}" is for processors, and trunk.device is {device.type}',
            remedy='take trunk.weights = "nf4", which is 4 bits on accelerators; or ' + _REMEDY,
        )
    capability, machine = torch.backends.cpu.get_cpu_capability(), platform.machine()
    if capability not in ("AVX2", "AVX512") and machine not in ("aarch64", "arm64"):
        raise NotSupportedError(
            f'trunk.weights = "{weights}" needs AVX2, AVX-512 or an ARM processor; '
            f"this {machine} has {capability.lower()}",
            remedy=_REMEDY,
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
    part.to(device)


def _rounded(name: str, weights: str, device: torch.device, layer: nn.Linear) -> nn.Module:
    kind = kind_of(weights, name, *layer.weight.shape)
    return layer if kind is None else kind(layer.to(device))


def _bitsandbytes() -> Any:
    """The package, which takes a second to import.

    Raises:
        NotSupportedError: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise NotSupportedError(
            'trunk.weights = "nf4" takes the package bitsandbytes, which is not installed',
            remedy="install it with: pip install 'isthmus[bits]'; or " + _REMEDY,
        ) from error
    return bitsandbytes


def _try_bitsandbytes(device: torch.device) -> None:
    """Let it round a small layer on the device and multiply.

    Raises:
        NotSupportedError: it cannot.
    """
    _bitsandbytes()
    try:
        layer = NF4Linear(nn.Linear(64, 16, device=device).requires_grad_(False))
        layer(torch.ones(1, 64, device=device)).tolist()
    except (RuntimeError, NotImplementedError, OSError, AttributeError) as error:
        raise NotSupportedError(
            f'trunk.weights = "nf4": bitsandbytes does not compute on {device} here: {error}',
            remedy="install a bitsandbytes that has this device ('python -m bitsandbytes' tells); or " + _REMEDY,
        ) from error


def _product(x: torch.Tensor, layer: RoundedLinear) -> torch.Tensor:
    x_TK = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    return layer.product(x_TK).to(x.dtype).view(*x.shape[:-1], layer.out_features)


class _Product(torch.autograd.Function):
    """Inputs times weights. The inputs' gradient is computed with the weights in fp32, which are made for it and not
    kept; the weights have none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: RoundedLinear) -> torch.Tensor:
        ctx.layer = layer
        return _product(x, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient @ ctx.layer.weight.to(gradient.dtype), None
