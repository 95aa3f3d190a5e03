"""Measures of statistical dependence with gradients, so that a loss can penalize them.

Shapes: T samples, D and E widths of the two variables, W width of a channel.
"""

from __future__ import annotations

import torch


def capacity(z_TW: torch.Tensor, noise: float | torch.Tensor) -> torch.Tensor:
    """The capacity of a Gaussian channel at the mean power of these inputs, in nats a use, scalar.

    ``W/2 · log(1 + E‖z‖² / (W·noise²))`` (Shannon 1949). It bounds the mutual information between the channel's output
    and anything that z was computed from.

    Args:
        z_TW: inputs of the channel, one a row.
        noise: standard deviation of the noise on each coordinate.
    """
    width = z_TW.shape[1]
    power = z_TW.square().sum(dim=1).mean() / width
    return width / 2 * torch.log1p(power / noise**2)


def distance_correlation(x_TD: torch.Tensor, y_TE: torch.Tensor) -> torch.Tensor:
    """The distance correlation of two variables, a scalar between 0 and 1 (Székely et al. 2007).

    0: independent; 1: one is a translated and scaled copy of the other. NoPeek (Vepakomma et al. 2020) uses it as the
    measure of leakage in split learning. Needs at least two samples.
    """
    a_TT, b_TT = _centred_distances(x_TD), _centred_distances(y_TE)
    both = (a_TT * b_TT).mean()
    each = (a_TT.square().mean() * b_TT.square().mean()).clamp_min(1e-24).sqrt()
    return (both.clamp_min(0.0) / each).clamp_min(1e-12).sqrt()


def _centred_distances(x_TD: torch.Tensor) -> torch.Tensor:
    square_T = x_TD.square().sum(dim=1)
    square_TT = square_T.unsqueeze(0) + square_T.unsqueeze(1) - 2 * x_TD @ x_TD.T
    far_TT = square_TT.clamp_min(1e-12).sqrt()  # the square root has no gradient at 0
    return far_TT - far_TT.mean(dim=0, keepdim=True) - far_TT.mean(dim=1, keepdim=True) + far_TT.mean()
