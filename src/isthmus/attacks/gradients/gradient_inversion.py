"""Answer tokens from the trunk's results (logit lens) and by inversion of the loss gradients at the answer's positions.

With top and the trunk's result known, the released gradient is linear in the one-hot labels (see ``lens``). The labels
are solved by damped least squares, decoded over the whole vocabulary with top's own prediction as the prior, and then
improved while the fit improves: first all positions at once by an approximation, then each position exactly among its
best few tokens.

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

NOISE_FLOOR = 1e-6
"""Smallest assumed noise, as a share of the gradient's root mean square."""
ITERATIONS = 60
"""Most iterations of conjugate gradients."""
SWEEPS = 24
"""Most rounds of changes at all positions."""
PROBES = 4
"""Random probes of the Gram matrix."""
SHORTLIST = 8
"""Tokens that are tried exactly at a position."""
LONG_SHORTLIST = 64
"""Tokens that are tried exactly at a position whose residual exceeds the noise."""
UNEXPLAINED = 4.0
"""Mean squared residual at a position, in units of the noise variance, above which its token is taken as wrong."""
LEAST_SCORE = 30.0
"""Tokens with a score this many nats below the position's best are not tried exactly."""


@torch.no_grad()
def logit_lens(top: Part, g_LD: torch.Tensor, *, keep: int = 1) -> torch.Tensor:
    """The K likeliest next tokens at every position of one sequence by top, ``[L, K]``: the logit lens.

    Adversary: the trunk, with the base model's public top or a colluding silo's shared adapters. With the silo's own
    top, column 0 is exactly the greedy answer in generation.

    Args:
        g_LD: the trunk's result for the sequence.
        keep: K.
    """
    logits_1LV = top.model(inputs_embeds=g_LD.to(torch.float32).unsqueeze(0), use_cache=False).logits
    best_LK: torch.Tensor = logits_1LV[0].topk(keep, dim=1).indices
    return best_LK


@dataclass(frozen=True)
class GradientDefence:
    """The adversary's knowledge of a released gradient: its batch's weight, and the recipe's noise and clipping."""

    weight: float
    """Number of supervised tokens of the batch, over which the loss is a mean; the commit states it."""
    noise: float = 0.0
    """Standard deviation of the noise on a coordinate."""
    clip: float = 0.0
    """Clipping norm of each position's gradient; 0: none."""


class GradientInverter:
    """Recovers one sequence's supervised tokens from its released loss gradient.

    Adversary: the trunk, with top's public base weights or a colluding silo's shared adapters.

    Args:
        top: the adversary's top.
        g_LD: the trunk's result for the sequence.
        e_LD: the released gradient by that result.
        defence: the gradient's weight, noise and clipping.
        prior: weight of top's own prediction; 0: the gradient alone decides.
        ending: the last token of every answer, if it is known (the end-of-text token of free text).
        shortlist: number of tokens that are tried exactly at a position.

    Raises:
        DataError: the shapes of ``g_LD`` and ``e_LD`` differ.
    """

    def __init__(
        self,
        top: Part,
        g_LD: torch.Tensor,
        e_LD: torch.Tensor,
        defence: GradientDefence,
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
        self._noise = max(defence.noise, NOISE_FLOOR * float(self._e_LD.square().mean().sqrt()), 1e-30)
        self._scale_L1 = torch.ones(len(e_LD), 1)
        """Estimated norm of each row before clipping, divided by its norm after clipping."""

    def supervised(self) -> torch.Tensor:
        """The estimated supervised positions, ``[S]``: all from some position on, without the last.

        The first one is the change point of the solution's power along the sequence.
        """
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
        """The tokens that follow these positions, ``[S]``; None: the positions of ``supervised``."""
        at_S = self.supervised() if at_S is None else at_S
        for _ in range(3 if self._defence.clip else 1):
            token_S = self._improved(at_S, self._decoded(at_S, self._solve(at_S)))
            if not self._explained(at_S, token_S):
                token_S = self._refined(at_S, token_S)
            if self._defence.clip:
                expected_LD = self._lens.gradient(at_S, token_S, self._defence.weight)
                self._scale_L1 = (expected_LD.norm(dim=1, keepdim=True) / self._defence.clip).clamp_min(1.0)
        return token_S

    def _forward(self, u_LD: torch.Tensor) -> torch.Tensor:
        return self._lens.pull(u_LD) / self._scale_L1

    def _transposed(self, r_LD: torch.Tensor, at_S: torch.Tensor) -> torch.Tensor:
        pushed_LD = self._lens.push(r_LD / self._scale_L1)
        only_LD = torch.zeros_like(pushed_LD)
        only_LD[at_S] = pushed_LD[at_S]
        return only_LD

    def _damping(self) -> float:
        """Damping of the least squares: noise variance over the prior variance of a coordinate of the solution."""
        spread = float(self._lens.head_VD.var(dim=0).mean()) / self._defence.weight**2
        return self._noise**2 / spread

    def _solve(self, at_S: torch.Tensor) -> torch.Tensor:
        """The gradient by the head's input, ``[L, D]``, by damped least squares with conjugate gradients."""
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
        """Score of every token, ``[S, V]``: log-probability by top minus the misfit of its cotangent to ``aim_SD``."""
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
        deviation = self._deviation(self._e_LD - self._forward(u_LD))
        return self._nearest(at_S, u_LD[at_S] / shrunk_S1, gain_S1 * shrunk_S1 / deviation**2).argmax(dim=1)

    def _deviation(self, residual_LD: torch.Tensor) -> float:
        """The noise, or the residual's root mean square if it is larger, so that scores are not overconfident."""
        return max(self._noise, float(residual_LD.square().mean().sqrt()))

    def _improved(self, at_S: torch.Tensor, token_S: torch.Tensor) -> torch.Tensor:
        """Tokens after changes to those with the best score given the residual: as many changes at once as improve the
        fit, the largest gains first."""
        gain_S1 = self._gain(at_S)
        cost, residual_LD = self._cost(at_S, token_S)
        share = 1.0
        for _ in range(SWEEPS):
            score_SV = self._scores(at_S, token_S, residual_LD, gain_S1)
            best_S = score_SV.argmax(dim=1)
            every = torch.arange(len(at_S))
            advantage_S = score_SV[every, best_S] - score_SV[every, token_S]
            chosen = advantage_S.argsort(descending=True)[: max(1, int(share * int((advantage_S > 0).sum())))]
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
        """Whether there is no noise and these tokens explain the gradient completely."""
        expected_LD = self._forward(self._lens.cotangent(at_S, token_S, self._defence.weight))
        return not self._defence.noise and float((self._e_LD - expected_LD).norm()) < 1e-3 * float(self._e_LD.norm())

    def _refined(self, at_S: torch.Tensor, token_S: torch.Tensor) -> torch.Tensor:
        """Tokens after each position, from the last, takes the exactly best token of a shortlist.

        A position's gradient comes from its own loss and from later losses. So if the later tokens are right, a
        position with a large residual has a wrong token and gets a long shortlist, until a position stays unexplained.
        """
        gain_S1, token_S = self._gain(at_S), token_S.clone()
        prior_SV = self._lens.logits(at_S).log_softmax(dim=1)
        _, residual_LD = self._cost(at_S, token_S)
        score_SV = self._scores(at_S, token_S, residual_LD, gain_S1)
        later_right = True
        for place in reversed(range(len(at_S))):
            long = later_right and self._unexplained(residual_LD[at_S[place]])
            if long:
                score_SV = self._scores(at_S, token_S, residual_LD, gain_S1)
            best_K, shortlist_K = score_SV[place].topk(min(LONG_SHORTLIST, score_SV.shape[1]))
            shortlist_K = shortlist_K[best_K > (-torch.inf if long else best_K[0] - LEAST_SCORE)]
            if not long:
                shortlist_K = shortlist_K[: self._shortlist]
            token_S[place], residual_LD = self._best(
                at_S[place], int(token_S[place]), shortlist_K.tolist(), residual_LD, prior_SV[place]
            )
            later_right = later_right and not self._unexplained(residual_LD[at_S[place]])
        return token_S

    def _unexplained(self, residual_D: torch.Tensor) -> bool:
        return float(residual_D.square().mean()) > UNEXPLAINED * self._noise**2

    def _best(
        self, at: torch.Tensor, own: int, others: list[int], residual_LD: torch.Tensor, prior_V: torch.Tensor
    ) -> tuple[int, torch.Tensor]:
        """The best of these tokens at one position by their exact gradients, and its residual."""
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

    def _scores(
        self, at_S: torch.Tensor, token_S: torch.Tensor, residual_LD: torch.Tensor, gain_S1: torch.Tensor
    ) -> torch.Tensor:
        """Score of every token given the residual of the current tokens, ``[S, V]``."""
        own_LD = self._lens.cotangent(at_S, token_S, self._defence.weight)
        aim_SD = self._transposed(residual_LD, at_S)[at_S] / gain_S1 + own_LD[at_S]
        return self._nearest(at_S, aim_SD, gain_S1 / self._deviation(residual_LD) ** 2)

    def _cost(self, at_S: torch.Tensor, token_S: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Negative log-posterior of these tokens, and their residual, ``[L, D]``."""
        expected_LD = self._forward(self._lens.cotangent(at_S, token_S, self._defence.weight))
        residual_LD = self._e_LD - expected_LD
        prior_SV = self._lens.logits(at_S).log_softmax(dim=1)
        prior = float(prior_SV[torch.arange(len(at_S)), token_S].sum())
        return float(residual_LD.square().sum()) / (2 * self._noise**2) - self._prior * prior, residual_LD


class TokenProbe:
    """A linear probe from gradients to rows of the head, for an adversary without top's weights.

    Adversary: the trunk with a colluding silo, which knows the tokens behind its own gradients; the head is public.

    Args:
        e_ND: the colluder's released gradients at answer positions.
        tokens: the tokens that follow these positions.
        head_VD: the head's weight.
        ridge: penalty, as a share of the gradients' mean square.
    """

    def __init__(self, e_ND: torch.Tensor, tokens: Sequence[int], head_VD: torch.Tensor, *, ridge: float = 0.1) -> None:
        self._head_VD = torch.nn.functional.normalize((head_VD - head_VD.mean(dim=0)).double(), dim=1)
        x_ND = torch.nn.functional.normalize(e_ND.double(), dim=1)
        penalty = ridge * x_ND.square().sum() / x_ND.shape[1]
        gram_DD = x_ND.T @ x_ND + penalty * torch.eye(x_ND.shape[1], dtype=torch.float64)
        self._map_DD = torch.linalg.solve(gram_DD, x_ND.T @ self._head_VD[torch.as_tensor(tokens)])

    def predict(self, e_ND: torch.Tensor) -> list[int]:
        """The likeliest next token of each gradient."""
        x_ND = torch.nn.functional.normalize(e_ND.double(), dim=1)
        return [int(token) for token in (x_ND @ self._map_DD @ self._head_VD.T).argmax(dim=1)]
