"""Linear layers of the trunk in 8 bits: one token's pass on a processor takes as long as reading its weights.

A weight is whole numbers from -127 to 127 and a scale for each of its rows. Inputs are rounded to bfloat16, products
summed in fp32, results rounded to bfloat16. A token's result does not depend on the others of a pass.

Shapes: T tokens, N rows of a weight (outputs), K its columns (inputs).
"""

from __future__ import annotations

import platform
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from isthmus.errors import NotSupportedError
from isthmus.model.cut import Part

MULTIPLE = 16
"""Layers whose numbers of inputs and outputs are multiples of this have a kernel; others keep their weights."""
_REMEDY = 'leave trunk.weights out; trunk.dtype = "bfloat16" halves the weights on any machine'


def check_machine(device: torch.device) -> None:
    """Refuse 8-bit weights where torch has no fast kernel for them.

    Raises:
        NotSupportedError: the device is no processor, or the processor lacks the instructions.
    """
    if device.type != "cpu":
        raise NotSupportedError(
            f'trunk.weights = "int8" is for processors, and trunk.device is {device.type}', remedy=_REMEDY
        )
    capability, machine = torch.backends.cpu.get_cpu_capability(), platform.machine()
    if capability not in ("AVX2", "AVX512") and machine not in ("aarch64", "arm64"):
        raise NotSupportedError(
            f'trunk.weights = "int8" needs AVX2, AVX-512 or an ARM processor; this {machine} has {capability.lower()}',
            remedy=_REMEDY,
        )


def keep_in_int8(part: Part) -> None:
    """Replace the frozen linear layers of a part's blocks, in place; adapters stay as they are."""
    for name, layer in list(part.model.named_modules()):
        if name.startswith(part.family.block_prefix()) and "lora_" not in name and _frozen(layer):
            owner, _, own = name.rpartition(".")
            setattr(part.model.get_submodule(owner), own, Int8Linear(layer))


def _frozen(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer that does not train, of a size that there is a kernel for."""
    if type(layer) is not nn.Linear or layer.weight.requires_grad:
        return False
    return not any(size % MULTIPLE for size in layer.weight.shape)


class Int8Linear(nn.Module):
    """A frozen linear layer with the weights of another, rounded to 8 bits.

    Args:
        linear: the layer; its weight is not kept.
    """

    weight_NK: torch.Tensor
    scale_N: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight_NK = linear.weight.detach().float()
        scale_N = (weight_NK.abs().amax(dim=1) / 127).to(torch.bfloat16)
        scale_N[scale_N == 0] = 1.0
        whole_NK = (weight_NK / scale_N.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("weight_NK", whole_NK, persistent=False)
        self.register_buffer("scale_N", scale_N, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The weights that it computes with, ``[N, K]``, fp32: a copy."""
        return self.weight_NK.float() * self.scale_N.float()[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's result, ``[…, N]``, in the type of ``x``, ``[…, K]``."""
        if x.requires_grad and torch.is_grad_enabled():
            y: torch.Tensor = _Product.apply(x, self.weight_NK, self.scale_N)  # type: ignore[no-untyped-call]
        else:
            y = _product(x, self.weight_NK, self.scale_N)
        return y if self.bias is None else y + self.bias


def _product(x: torch.Tensor, weight_NK: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    x_TK = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    y_TN = torch._weight_int8pack_mm(x_TK, weight_NK, scale_N)
    return y_TN.to(x.dtype).view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """Input times weight. The input's gradient is computed with the weights in fp32; the weight has none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_NK: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight_NK, scale_N)
        return _product(x, weight_NK, scale_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight_NK, scale_N = ctx.saved_tensors
        return (gradient * scale_N.to(gradient.dtype)) @ weight_NK.to(gradient.dtype), None, None
