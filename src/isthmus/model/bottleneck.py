"""Optional layers where the parts meet: bottleneck, residual path and denoising.

*Bottleneck*: ``down`` in the silo projects a hidden state to fewer dimensions, ``up`` in the trunk projects it back.
Fewer bytes cross, and noise of the same size hides more. Both train with the adapters. Their initial value is one
random orthonormal basis.

*Residual*: the trunk answers with the change that its blocks make. The silo adds it to its own hidden state, which has
no noise. ``gate`` scales the change channel by channel.

*Denoising*: the silo knows the noise that the boundary drew. ``denoise``, in top, subtracts a learned linear function
of it from the trunk's answer. The trunk never receives the noise.

Shapes: T tokens, D the model's width, W the width that crosses.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear

from isthmus.errors import ModelError
from isthmus.model.cut import Part
from isthmus.recipe import BoundarySection

DOWN, UP, GATE, DENOISE = "boundary_down", "boundary_up", "boundary_gate", "boundary_denoise"
LAYER_WEIGHTS = tuple(f"{name}.weight" for name in (DOWN, UP, GATE, DENOISE))
"""Tensor names of the optional layers."""


def add_layers(part: Part, section: BoundarySection, *, frozen: bool) -> None:
    """Add the section's layers to a part; their values are uninitialized.

    Args:
        frozen: the layers do not train.

    Raises:
        ModelError: the bottleneck is not narrower than the model.
    """
    width: int = part.config.hidden_size
    if section.width is not None:
        if section.width >= width:
            raise ModelError(
                f"boundary.width is {section.width}, but the model's own width is {width}",
                remedy=f"set boundary.width below {width}, or leave it out",
            )
        if part.name == "bottom":
            _add(part, DOWN, (section.width, width), frozen)
        if part.name == "trunk":
            _add(part, UP, (width, section.width), frozen)
    if section.residual and part.name == "top":
        _add(part, GATE, (width,), frozen)
    if section.denoise and part.name == "top":
        _add(part, DENOISE, (width, section.width or width), frozen)


def initial_value(name: str, shape: torch.Size, generator: torch.Generator, *, narrow: bool) -> torch.Tensor:
    """The initial value of a tensor in ``LAYER_WEIGHTS``.

    ``down`` and ``up`` share one orthonormal basis, ``denoise`` is zero.

    Args:
        narrow: whether there is a bottleneck. With one, the gate is 0, since the trunk's answer to a random projection
            does not help; without one it is 1, as in the uncut model.
    """
    if name.startswith(GATE):
        return torch.zeros(shape) if narrow else torch.ones(shape)
    if name.startswith(DENOISE):
        return torch.zeros(shape)
    long, short = max(shape), min(shape)
    basis, triangle = torch.linalg.qr(torch.randn(long, short, generator=generator))
    basis = torch.mul(basis, triangle.diagonal().sign())
    return basis.T.contiguous() if shape[0] == short else basis


class Bottleneck:
    """The silo's optional layers at the cut: ``down`` in bottom, ``gate`` and ``denoise`` in top.

    Any of them may be absent. ``Bottleneck.of`` returns None where all are.
    """

    def __init__(self, bottom: Part, top: Part) -> None:
        self._down_WD = layer_weight(bottom, DOWN)
        self._gate_D = layer_weight(top, GATE)
        self._denoise_DW = layer_weight(top, DENOISE)

    @classmethod
    def of(cls, bottom: Part, top: Part) -> Bottleneck | None:
        """The layers of these ends, or None if they have none."""
        layers = cls(bottom, top)
        present = (layers._down_WD, layers._gate_D, layers._denoise_DW)
        return None if all(tensor is None for tensor in present) else layers

    @property
    def denoises(self) -> bool:
        """Whether ``join`` needs the noise that the boundary added."""
        return self._denoise_DW is not None

    def narrow(self, h_TD: torch.Tensor) -> torch.Tensor:
        """Bottom's hidden states projected to the width that crosses, ``[T, W]``."""
        return project(h_TD, self._down_WD)

    def join(self, h_TD: torch.Tensor | None, g_TD: torch.Tensor, noise_TW: torch.Tensor | None) -> torch.Tensor:
        """Top's input at the positions that crossed, ``[T, D]``.

        Args:
            h_TD: bottom's hidden states at these positions; only needed with a residual path.
            g_TD: the trunk's answer.
            noise_TW: the noise and rounding error in the hidden states that the trunk received.
        """
        if self._denoise_DW is not None and noise_TW is not None:
            g_TD = g_TD - project(noise_TW.to(g_TD.dtype), self._denoise_DW)
        if self._gate_D is None:
            return g_TD
        assert h_TD is not None
        return h_TD + self._gate_D.to(g_TD.dtype) * g_TD


def layer_weight(part: Part, name: str) -> torch.Tensor | None:
    """The weight of one of the optional layers, or None if the part lacks it.

    Args:
        name: ``DOWN``, ``UP``, ``GATE`` or ``DENOISE``.
    """
    module = part.model._modules.get(name)
    return None if module is None else module.get_parameter("weight")


def project(h_TD: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The states times the transposed weight of ``down`` or ``up``; unchanged if ``weight`` is None."""
    return h_TD if weight is None else linear(h_TD, weight.to(h_TD.dtype))


def _add(part: Part, name: str, shape: tuple[int, ...], frozen: bool) -> None:
    module = nn.Module()
    like = next(part.model.parameters())
    module.weight = nn.Parameter(torch.empty(shape, device=like.device), requires_grad=not frozen)
    part.model.add_module(name, module)
