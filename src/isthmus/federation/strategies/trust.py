"""A rule that believes one contribution, and others as far as they agree with it.

Shapes: N contributions, P parameters.
"""

from __future__ import annotations

import torch

from isthmus.federation.strategies.rules import Rule, total


class FLTrust(Rule):
    """The mean of all changes at the trusted one's length, weighed by the cosine of their angles to it, those that are
    negative left out (FLTrust, Cao et al. 2021).

    In the paper the root trains on a few rows of its own; here it is whoever the recipe trusts, a silo that the root's
    operator runs, say, and its change counts, too. Any number of the others may be malicious: the result is never
    longer than the trusted change, and never points away from it.
    """

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        trusted_P = changes_NP[0].double()
        length = trusted_P.norm()
        norms_N = torch.stack([change_P.double().norm() for change_P in changes_NP]).clamp_min(_TINY)
        products_N = torch.stack([change_P.double() @ trusted_P for change_P in changes_NP])
        trust_N = (products_N / norms_N / length.clamp_min(_TINY)).clamp_min(0)
        if not trust_N.any():  # the trusted change is zero, and so is all that is as long
            return trusted_P
        return total(changes_NP, trust_N / trust_N.sum() * (length / norms_N))


_TINY = torch.finfo(torch.float64).tiny
