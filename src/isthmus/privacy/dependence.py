"""How much one thing tells of another: measures that can be learned against.

Shapes: T samples, D and E their widths, W width of a channel.
"""

from __future__ import annotations

import torch


def capacity(z_TW: torch.Tensor, noise: float | torch.Tensor) -> torch.Tensor:
    """Nats that a Gaussian channel carries at most in one use, given the mean power of what is sent through it.

    ``W/2 · log(1 + E‖z‖² / (W·noise²))`` (Shannon 1949): whatever z was made of, and however, the mutual information
    with it is no more.
    """
    width = z_TW.shape[1]
    power = z_TW.square().sum(dim=1).mean() / width
    return width / 2 * torch.log1p(power / noise**2)


def distance_correlation(x_TD: torch.Tensor, y_TE: torch.Tensor) -> torch.Tensor:
    """Of two samples: 0 where they are independent, 1 where one is the other, moved and scaled (Székely et al. 2007).

    NoPeek (Vepakomma et al. 2020) takes it for what split learning leaks. With gradients; needs two samples at least.
    """
    a_TT, b_TT = _centred_distances(x_TD), _centred_distances(y_TE)
    both = (a_TT * b_TT).mean()
    each = (a_TT.square().mean() * b_TT.square().mean()).clamp_min(1e-24).sqrt()
    return (both.clamp_min(0.0) / each).clamp_min(1e-12).sqrt()


def _centred_distances(x_TD: torch.Tensor) -> torch.Tensor:
    square_T = x_TD.square().sum(dim=1)
    square_TT = square_T.unsqueeze(0) + square_T.unsqueeze(1) - 2 * x_TD @ x_TD.T
    far_TT = square_TT.clamp_min(1e-12).sqrt()  # the root has no gradient at 0
    return far_TT - far_TT.mean(dim=0, keepdim=True) - far_TT.mean(dim=1, keepdim=True) + far_TT.mean()
