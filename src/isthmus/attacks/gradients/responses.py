"""Response tokens from what the trunk returns, and from the loss gradients at the answer's positions.

The gradient that leaves is linear in the one-hot tokens once top and the trunk's result are known (see ``lens``). So
the tokens are found by least squares, damped as the noise demands, then decoded against the whole vocabulary together
with what top itself expects to come next (the prior), and mended as long as the fit improves: all positions at once by
an approximation, then one by one, exactly, among the best few of each.

Shapes: L positions of one sequence, S of them supervised, D width, V vocabulary, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isthmus.attacks.gradients.lens import Lens
from isthmus.errors import DataError
from isthmus.model.cut import Part
from isthmus.model.device import CPU

FLOOR = 1e-6
"""Noise that is assumed at least, as a share of the gradient's root mean square."""
ITERATIONS = 60
SWEEPS = 24
PROBES = 4
SHORTLIST = 8
WIDE = 64
"""Tokens that are tried where the ones found so far leave more than the noise unexplained."""
SUSPICIOUS = 4.0
"""What is left at a position, in units of the noise's variance, above which its token must be wrong."""
HOPELESS = 30.0
"""Nats behind the best of its position at which a token is not tried exactly."""


@torch.no_grad()
def read_ahead(top: Part, g_LD: torch.Tensor, *, keep: int = 1) -> torch.Tensor:
    """The likeliest next tokens at every position of one sequence, ``[L, K]``: the logit lens.

    Who has this: the trunk, alone with the base model's public top, or with the shared adapters of a colluding silo. In
    generation the greedy response is exactly column 0, if ``top`` is the silo's.
    """
    logits_1LV = top.model(inputs_embeds=g_LD.to(torch.float32).unsqueeze(0), use_cache=False).logits
    best_LK: torch.Tensor = logits_1LV[0].topk(keep, dim=1).indices
    return best_LK


@dataclass(frozen=True)
class Defence:
    """What the adversary knows of the recipe: how gradients are secured, and the weight that the commit tells."""

    weight: float
    """Supervised tokens of the batch, which the loss is a mean over."""
    noise: float = 0.0
    clip: float = 0.0


class GradientInverter:
    """Recovers one sequence's supervised tokens from its loss gradient.

    Who has this: the trunk (``g_LD`` its own result, ``e_LD`` what came back), with top's public base weights or the
    shared ones of a colluding silo.

    Args:
        top: as the adversary holds it.
        prior: weight of top's own expectation; 0 trusts the gradient alone.
        ending: the token that closes every answer, if that is known (the end-of-text token of free text).
        shortlist: tokens that are tried exactly at each position where the fit could be chance.
    """

    def __init__(
        self,
        top: Part,
        g_LD: torch.Tensor,
        e_LD: torch.Tensor,
        defence: Defence,
        *,
        prior: float = 1.0,
        ending: int | None = None,
        shortlist: int = SHORTLIST,
    ) -> None:
        if e_LD.shape != g_LD.shape:
            raise DataError(
                f"gradients of shape {tuple(e_LD.shape)} for results of {tuple(g_LD.shape)}",
                remedy="give the gradient and the trunk's result of the same sequence",
            )
        self._lens = Lens(top, g_LD)
        self._e_LD = e_LD.detach().to(torch.float32)
        self._defence, self._prior, self._shortlist = defence, prior, shortlist
        self._ending = ending
        self._noise = max(defence.noise, FLOOR * float(self._e_LD.square().mean().sqrt()), 1e-30)
        self._scale_L1 = torch.ones(len(e_LD), 1)
        """How much longer each row was before it was clipped, as far as is known."""

    def supervised(self) -> torch.Tensor:
        """The positions that seem to be followed by an answer's token: from some position on, all but the last."""
        everywhere = torch.arange(self._lens.length - 1)
        u_LD = self._solve(everywhere)
        power_L = u_LD[everywhere].square().mean(dim=1).double().clamp_min(1e-30)
        floor = float(power_L.max()) * 1e-10
        power_L = power_L + floor
        count = torch.arange(1, len(power_L))
        before, after = power_L.cumsum(0)[:-1] / count, power_L.flip(0).cumsum(0).flip(0)[1:] / count.flip(0)
        cost = count * before.log() + count.flip(0) * after.log()
        start = int(cost.argmin()) + 1 if len(cost) and len(power_L) * power_L.mean().log() > cost.min() else 0
        return everywhere[start:]

    def recover(self, at_S: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens that follow these positions, ``[S]``; None: where ``supervised`` says."""
        at_S = self.supervised() if at_S is None else at_S
        for _ in range(3 if self._defence.clip else 1):
            token_S = self._mended(at_S, self._decoded(at_S, self._solve(at_S)))
            if not self._explained(at_S, token_S):
                token_S = self._picked(at_S, token_S)
            if self._defence.clip:
                due_LD = self._lens.gradient(at_S, token_S, self._defence.weight)
                self._scale_L1 = (due_LD.norm(dim=1, keepdim=True) / self._defence.clip).clamp_min(1.0)
        return token_S

    def _forward(self, u_LD: torch.Tensor) -> torch.Tensor:
        return self._lens.pull(u_LD) / self._scale_L1

    def _transposed(self, r_LD: torch.Tensor, at_S: torch.Tensor) -> torch.Tensor:
        pushed_LD = self._lens.push(r_LD / self._scale_L1)
        only_LD = torch.zeros_like(pushed_LD)
        only_LD[at_S] = pushed_LD[at_S]
        return only_LD

    def _damping(self) -> float:
        """Noise variance over the variance of a coordinate of what is sought."""
        spread = float(self._lens.head_VD.var(dim=0).mean()) / self._defence.weight**2
        return self._noise**2 / spread

    def _solve(self, at_S: torch.Tensor) -> torch.Tensor:
        """Damped least squares for the gradient by the head's input, ``[L, D]``, by conjugate gradients."""
        damping = self._damping()
        u_LD = torch.zeros_like(self._e_LD)
        r_LD = self._transposed(self._e_LD, at_S)
        direction, size = r_LD, float(r_LD.square().sum())
        goal = size * 1e-14
        for _ in range(ITERATIONS):
            if size <= goal:
                break
            moved = self._transposed(self._forward(direction), at_S) + damping * direction
            step = size / float((direction * moved).sum())
            u_LD, r_LD = u_LD + step * direction, r_LD - step * moved
            size, last = float(r_LD.square().sum()), size
            direction = r_LD + size / last * direction
        return u_LD

    def _gain(self, at_S: torch.Tensor) -> torch.Tensor:
        """Mean eigenvalue of each position's Gram matrix, ``[S, 1]``, from random probes (Hutchinson)."""
        draw = torch.Generator(CPU).manual_seed(0)
        total_S1 = torch.zeros(len(at_S), 1)
        for _ in range(PROBES):
            probe_LD = torch.zeros_like(self._e_LD)
            probe_LD[at_S] = torch.randn(len(at_S), probe_LD.shape[1], generator=draw, device=CPU).to(probe_LD)
            through_LD = self._transposed(self._forward(probe_LD), at_S)
            total_S1 += (probe_LD * through_LD)[at_S].mean(dim=1, keepdim=True)
        return (total_S1 / PROBES).clamp_min(1e-12)

    @torch.no_grad()
    def _nearest(self, at_S: torch.Tensor, aim_SD: torch.Tensor, precision_S1: torch.Tensor) -> torch.Tensor:
        """For every token: log-probability by top, less the misfit of its cotangent to the aim; ``[S, V]``."""
        lens, weight = self._lens, self._defence.weight
        logits_SV = lens.logits(at_S)
        prior_SV, slope = logits_SV.log_softmax(dim=1), lens.slope(logits_SV)
        centre_SD = (prior_SV.exp() * slope) @ lens.head_VD / weight - aim_SD
        sizes_V = lens.head_VD.square().sum(dim=1) / weight**2
        misfit_SV = slope * slope * sizes_V - 2 * slope * (centre_SD @ lens.head_VD.T) / weight
        score_SV = self._prior * prior_SV - precision_S1 / 2 * misfit_SV
        if self._ending is not None:
            score_SV[-1] = -torch.inf
            score_SV[-1, self._ending] = 0.0
        return score_SV

    def _decoded(self, at_S: torch.Tensor, u_LD: torch.Tensor) -> torch.Tensor:
        gain_S1 = self._gain(at_S)
        shrunk_S1 = gain_S1 / (gain_S1 + self._damping())
        doubt = self._doubt(self._e_LD - self._forward(u_LD))
        return self._nearest(at_S, u_LD[at_S] / shrunk_S1, gain_S1 * shrunk_S1 / doubt**2).argmax(dim=1)

    def _doubt(self, residual_LD: torch.Tensor) -> float:
        """The noise, or what is unexplained so far if that is more: approximate scores must not claim more."""
        return max(self._noise, float(residual_LD.square().mean().sqrt()))

    def _mended(self, at_S: torch.Tensor, token_S: torch.Tensor) -> torch.Tensor:
        """Tokens changed to what the residual asks for: as many at once as still improve the fit, most urgent first."""
        gain_S1 = self._gain(at_S)
        cost, residual_LD = self._cost(at_S, token_S)
        share = 1.0
        for _ in range(SWEEPS):
            score_SV = self._wished(at_S, token_S, residual_LD, gain_S1)
            best_S = score_SV.argmax(dim=1)
            every = torch.arange(len(at_S))
            urgency_S = score_SV[every, best_S] - score_SV[every, token_S]
            chosen = urgency_S.argsort(descending=True)[: max(1, int(share * int((urgency_S > 0).sum())))]
            better_S = token_S.clone()
            better_S[chosen] = best_S[chosen]
            new_cost, new_residual_LD = self._cost(at_S, better_S)
            if new_cost < cost:
                token_S, cost, residual_LD, share = better_S, new_cost, new_residual_LD, min(1.0, 2 * share)
            elif len(chosen) == 1:
                break
            else:
                share /= 4
        return token_S

    def _explained(self, at_S: torch.Tensor, token_S: torch.Tensor) -> bool:
        """Whether there is no noise and these tokens leave nothing over."""
        due_LD = self._forward(self._lens.cotangent(at_S, token_S, self._defence.weight))
        return not self._defence.noise and float((self._e_LD - due_LD).norm()) < 1e-3 * float(self._e_LD.norm())

    def _picked(self, at_S: torch.Tensor, token_S: torch.Tensor) -> torch.Tensor:
        """Tokens changed one by one, from the last, to the exactly best of a shortlist.

        A position's gradient comes of its own loss and of later ones. So once the later tokens are right, a position
        that is not explained has a wrong token: there the shortlist is long, until one stays unexplained.
        """
        gain_S1, token_S = self._gain(at_S), token_S.clone()
        prior_SV = self._lens.logits(at_S).log_softmax(dim=1)
        _, residual_LD = self._cost(at_S, token_S)
        score_SV = self._wished(at_S, token_S, residual_LD, gain_S1)
        hopeful = True
        for place in reversed(range(len(at_S))):
            wide = hopeful and self._suspicious(residual_LD[at_S[place]])
            if wide:
                score_SV = self._wished(at_S, token_S, residual_LD, gain_S1)
            best_K, shortlist_K = score_SV[place].topk(min(WIDE, score_SV.shape[1]))
            shortlist_K = shortlist_K[best_K > (-torch.inf if wide else best_K[0] - HOPELESS)]
            if not wide:
                shortlist_K = shortlist_K[: self._shortlist]
            token_S[place], residual_LD = self._best(
                at_S[place], int(token_S[place]), shortlist_K.tolist(), residual_LD, prior_SV[place]
            )
            hopeful = hopeful and not self._suspicious(residual_LD[at_S[place]])
        return token_S

    def _suspicious(self, residual_D: torch.Tensor) -> bool:
        return float(residual_D.square().mean()) > SUSPICIOUS * self._noise**2

    def _best(
        self, at: torch.Tensor, own: int, others: list[int], residual_LD: torch.Tensor, prior_V: torch.Tensor
    ) -> tuple[int, torch.Tensor]:
        """The best of these tokens at one position, by their exact gradients, and the residual that it leaves."""
        at_1, weight = at.unsqueeze(0), self._defence.weight
        base_LD = self._lens.cotangent(at_1, torch.tensor([own]), weight)
        tried = [(0.0, own, residual_LD)]
        for token in others:
            if token != own:
                change_LD = self._forward(self._lens.cotangent(at_1, torch.tensor([token]), weight) - base_LD)
                left_LD = residual_LD - change_LD
                fit = float(left_LD.square().sum() - residual_LD.square().sum()) / (2 * self._noise**2)
                tried.append((fit - self._prior * float(prior_V[token] - prior_V[own]), token, left_LD))
        _, token, left_LD = min(tried, key=lambda one: one[0])
        return token, left_LD

    def _wished(
        self, at_S: torch.Tensor, token_S: torch.Tensor, residual_LD: torch.Tensor, gain_S1: torch.Tensor
    ) -> torch.Tensor:
        """Each token's score by what the residual asks of each position, ``[S, V]``."""
        own_LD = self._lens.cotangent(at_S, token_S, self._defence.weight)
        wish_SD = self._transposed(residual_LD, at_S)[at_S] / gain_S1 + own_LD[at_S]
        return self._nearest(at_S, wish_SD, gain_S1 / self._doubt(residual_LD) ** 2)

    def _cost(self, at_S: torch.Tensor, token_S: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Negative log-posterior of these tokens, and what they leave unexplained."""
        due_LD = self._forward(self._lens.cotangent(at_S, token_S, self._defence.weight))
        residual_LD = self._e_LD - due_LD
        prior_SV = self._lens.logits(at_S).log_softmax(dim=1)
        prior = float(prior_SV[torch.arange(len(at_S)), token_S].sum())
        return float(residual_LD.square().sum()) / (2 * self._noise**2) - self._prior * prior, residual_LD


class TokenProbe:
    """A linear map from gradients to the tokens' rows of the head, where top's weights cannot be had.

    Who has this: the trunk with a colluding silo, which knows the tokens behind its own gradients; the head is public.

    Args:
        e_ND: the colluder's gradients at answer positions, secured as everybody's.
        tokens: what followed these positions.
        ridge: penalty, as a share of the gradients' mean square.
    """

    def __init__(self, e_ND: torch.Tensor, tokens: Sequence[int], head_VD: torch.Tensor, *, ridge: float = 0.1) -> None:
        self._head_VD = torch.nn.functional.normalize((head_VD - head_VD.mean(dim=0)).double(), dim=1)
        x_ND = torch.nn.functional.normalize(e_ND.double(), dim=1)
        penalty = ridge * x_ND.square().sum() / x_ND.shape[1]
        gram_DD = x_ND.T @ x_ND + penalty * torch.eye(x_ND.shape[1], dtype=torch.float64)
        self._map_DD = torch.linalg.solve(gram_DD, x_ND.T @ self._head_VD[torch.as_tensor(tokens)])

    def predict(self, e_ND: torch.Tensor) -> list[int]:
        x_ND = torch.nn.functional.normalize(e_ND.double(), dim=1)
        return [int(token) for token in (x_ND @ self._map_DD @ self._head_VD.T).argmax(dim=1)]
