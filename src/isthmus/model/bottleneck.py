"""The layers that a recipe may add where the parts meet: a narrow crossing, and a residual path that stays in the silo.

*Bottleneck*: ``down`` in the silo maps a hidden state to fewer numbers, ``up`` in the trunk maps them back. Fewer bytes
cross, and the same noise hides more. Both are trained with the adapters; they start as one random projection.

*Residual*: the trunk answers with what its blocks added, and the silo adds that to its own state, which no noise ever
touched; ``gate`` weighs it, channel by channel.

*Denoising*: top, in the silo, knows the noise that the boundary drew, and ``denoise`` takes a learned linear part of it
out of the trunk's answer. The trunk never learns it.

Shapes: T tokens, D the model's width, W numbers that cross.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear

from isthmus.errors import ModelError
from isthmus.model.cut import Part
from isthmus.recipe import BoundarySection

DOWN, UP, GATE, DENOISE = "boundary_down", "boundary_up", "boundary_gate", "boundary_denoise"
NAMES = tuple(f"{name}.weight" for name in (DOWN, UP, GATE, DENOISE))


def add_crossing(part: Part, section: BoundarySection, *, frozen: bool) -> None:
    """Add the layers of this section to a part, without values yet.

    Args:
        frozen: it does not train.

    Raises:
        ModelError: the bottleneck is no narrower than the model.
    """
    width: int = part.config.hidden_size
    if section.width is not None:
        if section.width >= width:
            raise ModelError(
                f"a bottleneck of {section.width} in a model of width {width}", remedy="lower boundary.width"
            )
        if part.name == "bottom":
            _add(part, DOWN, (section.width, width), frozen)
        if part.name == "trunk":
            _add(part, UP, (width, section.width), frozen)
    if section.residual and part.name == "top":
        _add(part, GATE, (width,), frozen)
    if section.denoise and part.name == "top":
        _add(part, DENOISE, (width, section.width or width), frozen)


def initial(name: str, shape: torch.Size, generator: torch.Generator, *, narrow: bool) -> torch.Tensor:
    """The value that one of ``NAMES`` starts with: the same orthonormal basis for down and up, nothing for denoising.

    Args:
        narrow: there is a bottleneck. What a trunk answers to a random projection is no help, so the gate starts shut;
            else it starts open, as the uncut model has it.
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
    """The layers in a silo's ends that meet the trunk: ``down`` in bottom, ``gate`` and ``denoise`` in top.

    Args:
        bottom, top: the ends; ``of`` gives None where the recipe adds no layer to them.
    """

    def __init__(self, bottom: Part, top: Part) -> None:
        self._down_WD = tensor_of(bottom, DOWN)
        self._gate_D = tensor_of(top, GATE)
        self._denoise_DW = tensor_of(top, DENOISE)

    @classmethod
    def of(cls, bottom: Part, top: Part) -> Bottleneck | None:
        layers = cls(bottom, top)
        present = (layers._down_WD, layers._gate_D, layers._denoise_DW)
        return None if all(tensor is None for tensor in present) else layers

    @property
    def denoises(self) -> bool:
        """Whether ``join`` wants to know the noise that the boundary added."""
        return self._denoise_DW is not None

    def narrow(self, h_TD: torch.Tensor) -> torch.Tensor:
        """The numbers that cross of bottom's result, ``[T, W]``."""
        return project(h_TD, self._down_WD)

    def join(self, h_TD: torch.Tensor | None, g_TD: torch.Tensor, noise_TW: torch.Tensor | None) -> torch.Tensor:
        """Top's input at the positions that crossed, ``[T, D]``.

        Args:
            h_TD: bottom's result at these positions; needed with a residual path alone.
            g_TD: the trunk's answer.
            noise_TW: what boundary and codec added before the trunk answered; a learned linear part of it is taken out.
        """
        if self._denoise_DW is not None and noise_TW is not None:
            g_TD = g_TD - project(noise_TW.to(g_TD.dtype), self._denoise_DW)
        if self._gate_D is None:
            return g_TD
        assert h_TD is not None
        return h_TD + self._gate_D.to(g_TD.dtype) * g_TD


def tensor_of(part: Part, name: str) -> torch.Tensor | None:
    """The weight of one of the added modules, if the part has it."""
    module = part.model._modules.get(name)
    return None if module is None else module.get_parameter("weight")


def project(h_TD: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Through ``down`` or ``up``, where there is one."""
    return h_TD if weight is None else linear(h_TD, weight.to(h_TD.dtype))


def _add(part: Part, name: str, shape: tuple[int, ...], frozen: bool) -> None:
    module = nn.Module()
    like = next(part.model.parameters())
    module.weight = nn.Parameter(torch.empty(shape, device=like.device), requires_grad=not frozen)
    part.model.add_module(name, module)
