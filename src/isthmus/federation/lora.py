"""Exact aggregation of LoRA's products, whatever the silos' ranks.

What a silo adds to a weight is a product B·A, and what is to be averaged are the products. Averages of B and A apart
miss that by the residual. Nothing here forms an O × I matrix; all of it is in fp64.

Shapes: N silos, O outputs, I inputs, R a product's rank, S the sum of many ranks, K the rank that QR leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class Product:
    """B·A, as its factors."""

    b_OR: torch.Tensor
    a_RI: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def padded(self, rank: int) -> Product:
        """This product with zeros up to this rank."""
        missing = max(0, rank - self.rank)
        return Product(pad(self.b_OR, (0, missing)), pad(self.a_RI, (0, 0, 0, missing)))


def averaged(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """The means of B and A apart: not the mean of the products, but what they miss is ``residual``.

    Args:
        products: of one rank.
        weights: above 0; their proportions count.
    """
    shares_N = _shares(weights)
    b_NOR = torch.stack([one.b_OR.double() for one in products])
    a_NRI = torch.stack([one.a_RI.double() for one in products])
    return Product(torch.einsum("n,nor->or", shares_N, b_NOR), torch.einsum("n,nri->ri", shares_N, a_NRI))


def residual(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """The mean of the products less the product of the means, of rank N·R (FedEx-LoRA, Singhal et al. 2024).

    It is the covariance of B and A, Σ wᵢ·(Bᵢ − B̄)·(Aᵢ − Ā): a sum of small things rather than a difference of large
    ones. Added to the frozen weight it makes the round exact. Arguments as in ``averaged``.
    """
    mean = averaged(products, weights)
    apart = [Product(one.b_OR.double() - mean.b_OR, one.a_RI.double() - mean.a_RI) for one in products]
    return stacked(apart, weights)


def stacked(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """The mean of the products, with all factors beside one another, of rank S (FLoRA, Wang et al. 2024).

    Args:
        products: of any ranks.
        weights: above 0; their proportions count.
    """
    shares = _shares(weights).tolist()
    b_OS = torch.cat([share * one.b_OR.double() for share, one in zip(shares, products, strict=True)], dim=1)
    return Product(b_OS, torch.cat([one.a_RI.double() for one in products]))


def truncated(product: Product, rank: int) -> Product:
    """The product of this rank that is nearest to a product (FlexLoRA, Bai et al. 2024): equal, if the rank suffices.

    B has the singular values. The rows of A are orthonormal, also those beyond the product's own rank, where B is
    zero: were both zero, neither would ever get a gradient.
    """
    wide = product.padded(rank)
    q_OK, r_KS = torch.linalg.qr(wide.b_OR.double())
    q_IK, t_KS = torch.linalg.qr(wide.a_RI.double().T)
    u_KK, s_K, v_KK = torch.linalg.svd(r_KS @ t_KS.T, full_matrices=False)
    nearest = Product(q_OK @ (u_KK * s_K)[:, :rank], v_KK[:rank] @ q_IK.T)
    return nearest.padded(rank)


def _shares(weights: Sequence[float]) -> torch.Tensor:
    weights_N = torch.tensor(weights, dtype=torch.float64)
    return weights_N / weights_N.sum()
