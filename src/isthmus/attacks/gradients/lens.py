"""Top as an adversary holds it: its next-token distribution (logit lens) and the loss gradient that it would send.

Base weights are public, and every silo has the shared adapters at the beginning of a round. So whoever has the trunk's
result for a sequence can run top on it, and can compute top's Jacobian there. A silo's loss gradient is the transposed
Jacobian applied to (predicted distribution − one-hot label) · head, which is linear in the secret labels.

Shapes: L positions of one sequence, S of them supervised, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from isthmus.model.cut import Part


class Lens:
    """Top and its Jacobian at the trunk's result for one sequence.

    Adversary: the trunk, which has the result exactly, with the public model's top; pooled with a silo or the root,
    with the shared adapters too.

    Args:
        top: the adversary's top.
        g_LD: the trunk's result for the whole sequence.
    """

    def __init__(self, top: Part, g_LD: torch.Tensor) -> None:
        self.g_LD = g_LD.detach().to(torch.float32).clone().requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            self.z_LD = top.hidden(inputs_embeds=self.g_LD.unsqueeze(0), use_cache=False).squeeze(0)
            self._probe_LD = torch.zeros_like(self.z_LD, requires_grad=True)
            (self._pulled_LD,) = torch.autograd.grad(self.z_LD, self.g_LD, self._probe_LD, create_graph=True)
        self.head_VD: torch.Tensor = top.model.get_parameter(f"{top.family.head}.weight").detach().to(torch.float32)
        self._cap: float | None = getattr(top.config, "final_logit_softcapping", None)

    @property
    def length(self) -> int:
        """Number of positions."""
        return len(self.g_LD)

    @torch.no_grad()
    def logits(self, at_S: torch.Tensor) -> torch.Tensor:
        """The next token's logits at these positions, ``[S, V]``."""
        raw_SV = self.z_LD[at_S] @ self.head_VD.T
        return raw_SV if self._cap is None else self._cap * (raw_SV / self._cap).tanh()

    def slope(self, logits_SV: torch.Tensor) -> torch.Tensor | float:
        """Derivative of the logits by the head's output: 1, or that of the family's soft-capping, ``[S, V]``."""
        return 1.0 if self._cap is None else 1 - (logits_SV / self._cap).square()

    def pull(self, u_LD: torch.Tensor) -> torch.Tensor:
        """The gradient by the trunk's result for a gradient by the head's input (transposed Jacobian), ``[L, D]``."""
        (e_LD,) = torch.autograd.grad(self.z_LD, self.g_LD, u_LD, retain_graph=True)
        return e_LD

    def push(self, r_LD: torch.Tensor) -> torch.Tensor:
        """The head input's directional derivative along ``r_LD`` of the trunk's result (Jacobian), ``[L, D]``."""
        moved_LD: torch.Tensor
        (moved_LD,) = torch.autograd.grad(self._pulled_LD, self._probe_LD, r_LD, retain_graph=True)
        return moved_LD

    @torch.no_grad()
    def cotangent(self, at_S: torch.Tensor, token_S: torch.Tensor, weight: float) -> torch.Tensor:
        """The loss gradient by the head's input, ``[L, D]``, if ``token_S`` follow the positions ``at_S``.

        Args:
            weight: number of supervised tokens over which the loss is a mean.
        """
        logits_SV = self.logits(at_S)
        error_SV = logits_SV.softmax(dim=1)
        error_SV[torch.arange(len(at_S)), token_S] -= 1
        u_LD = torch.zeros_like(self.g_LD)
        u_LD[at_S] = (error_SV * self.slope(logits_SV)) @ self.head_VD / weight
        return u_LD

    def gradient(self, at_S: torch.Tensor, token_S: torch.Tensor, weight: float) -> torch.Tensor:
        """The loss gradient by the trunk's result, ``[L, D]``, if ``token_S`` follow the positions ``at_S``.

        Args:
            weight: number of supervised tokens over which the loss is a mean.
        """
        return self.pull(self.cotangent(at_S, token_S, weight))


def clipped(e_LD: torch.Tensor, clip: float) -> torch.Tensor:
    """The rows, each scaled down to at most the norm ``clip``, as the boundary clips; 0: unchanged."""
    if not clip:
        return e_LD
    shrink_L1: torch.Tensor = (clip / e_LD.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
    return e_LD * shrink_L1
