"""Text recovery by gradient matching: a search for inputs whose gradient equals the observed one.

DLG (Zhu et al. 2019) with the cosine distance of Geiping et al. (2020), and with LAMP's embedding regularization and
discrete moves scored by a language model (Balunović et al. 2022). Where ``dager`` is exact it is better; this attack is
for more tokens than the adapter's rank, other optimizers, and noise.

Shapes: L positions, D width, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize

from isthmus.errors import DataError
from isthmus.model.device import CPU

Tensors = Mapping[str, torch.Tensor]
GradientOf = Callable[[torch.Tensor], Tensors]
"""From input embeddings ``[L, D]`` to the gradient that they cause, by tensor name; differentiable."""
EXACT_DISTANCE = 1e-4
"""Distance below which a match is taken as exact."""
POOL_SIZE = 16
"""Tokens per position and criterion that the discrete moves try."""
TextLoss = Callable[[Sequence[int]], float]
"""A language model's mean loss per token of a text."""


@dataclass(frozen=True)
class MatcherSettings:
    """Settings of the search."""

    starts: int = 8
    """Random initial embeddings per attempt, of which the best is optimized."""
    tries: int = 3
    """Most attempts; an exact match ends the search."""
    steps: int = 300
    """Optimizer steps per attempt."""
    learning_rate: float = 0.1
    """Adam's learning rate, as a multiple of the root mean square of an embedding's coordinates."""
    every: int = 50
    """Optimizer steps between rounds of discrete moves."""
    moves: int = 40
    """Swaps, shifts and replacements of tokens per round."""
    sweeps: int = 4
    """Most passes over all positions at the end of an attempt."""
    penalty: float = 0.05
    """Weight of the regularization of the embeddings' mean norm towards the vocabulary's."""
    fluency: float = 0.05
    """Weight of the language model's loss beside the gradient distance in discrete moves."""
    seed: int = 0


@dataclass(frozen=True)
class Match:
    """The best text of a search."""

    ids: list[int]
    distance: float
    """Cosine distance between this text's gradient and the observed gradient, 0 to 2."""


class GradientMatcher:
    """Searches for one text whose gradient is nearest to the observed one.

    Adversary: the root, with the public base model, the shared adapters and, pooled with the trunk, the trunk's
    adapter. A silo's update stands for its gradient: exactly after one step of SGD, approximately after more steps or
    with another optimizer. If labels are choices, one search per choice is needed.

    Args:
        gradient_of: the gradient by the adversary's copy of the model (see ``adapter_gradient``).
        observed: the observed gradient or negative update, by tensor name. Only its direction matters.
        embedding_VD: the model's embedding.
        text_loss: a language model's loss of a text; None: moves are compared by the gradient alone.
        settings: settings of the search.

    Raises:
        DataError: the observed gradient is zero.
    """

    def __init__(
        self,
        gradient_of: GradientOf,
        observed: Tensors,
        embedding_VD: torch.Tensor,
        *,
        text_loss: TextLoss | None = None,
        settings: MatcherSettings = MatcherSettings(),
    ) -> None:
        self._gradient_of, self._settings, self._text_loss = gradient_of, settings, text_loss
        self._observed = {name: tensor.detach().float() for name, tensor in observed.items() if bool(tensor.any())}
        if not self._observed:
            raise DataError("the update is zero", remedy="give the update of a silo that trained")
        self._embedding_VD = embedding_VD.detach().float()
        self._length = float(self._embedding_VD.norm(dim=1).mean())
        self._random = random.Random(settings.seed)
        self._draw = torch.Generator(CPU).manual_seed(settings.seed)

    def distance(self, x_LD: torch.Tensor) -> torch.Tensor:
        """Cosine distance between the inputs' gradient and the observed one, the mean over its tensors; a
        differentiable scalar, 0 to 2.

        Raises:
            DataError: ``gradient_of`` gives no gradient of an observed tensor.
        """
        gradient = self._gradient_of(x_LD)
        if missing := sorted(self._observed.keys() - gradient.keys()):
            raise DataError(f"the model gives no gradient of {missing[0]}", remedy="give it the silo's adapter layers")
        distances = [
            1 - (gradient[name] * observed).sum() / (gradient[name].norm() * observed.norm()).clamp_min(1e-30)
            for name, observed in self._observed.items()
        ]
        return torch.stack(distances).mean()

    def match(self, length: int, known: Mapping[int, int] | None = None) -> Match:
        """The best text of ``length`` tokens.

        Args:
            known: tokens that the adversary knows, such as the template's, by position.
        """
        best = self._try(length, dict(known or {}))
        for _ in range(1, self._settings.tries):
            if best.distance < EXACT_DISTANCE:
                break
            best = min(best, self._try(length, dict(known or {})), key=lambda match: match.distance)
        return best

    def _try(self, length: int, known: Mapping[int, int]) -> Match:
        x_LD = min((self._start(length, known) for _ in range(self._settings.starts)), key=self._value)
        for _ in range(0, self._settings.steps, self._settings.every):
            x_LD = self._descend(x_LD, known)
            x_LD = self._moved(self.nearest(x_LD), x_LD, known)
        ids = self._polished(self.nearest(x_LD), x_LD, known)
        return Match(ids, self._value(self._embedding_VD[ids]))

    def nearest(self, x_LD: torch.Tensor) -> list[int]:
        """The token whose embedding has the largest cosine similarity with each vector."""
        similar_LV = normalize(x_LD.detach(), dim=1) @ normalize(self._embedding_VD, dim=1).T
        return [int(token) for token in similar_LV.argmax(dim=1)]

    def _start(self, length: int, known: Mapping[int, int]) -> torch.Tensor:
        ids_L = torch.randint(len(self._embedding_VD), (length,), generator=self._draw, device=CPU)
        return self._pinned(self._embedding_VD[ids_L].clone(), known)

    def _pinned(self, x_LD: torch.Tensor, known: Mapping[int, int]) -> torch.Tensor:
        for place, token in known.items():
            x_LD[place] = self._embedding_VD[token]
        return x_LD

    def _value(self, x_LD: torch.Tensor) -> float:
        return float(self.distance(x_LD).detach())

    def _descend(self, x_LD: torch.Tensor, known: Mapping[int, int]) -> torch.Tensor:
        """``every`` steps of Adam from these embeddings."""
        size = self._length / x_LD.shape[1] ** 0.5
        free_LD = x_LD.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([free_LD], lr=self._settings.learning_rate * size)
        for _ in range(self._settings.every):
            optimizer.zero_grad()
            length = free_LD.norm(dim=1).mean() / self._length
            loss = self.distance(free_LD) + self._settings.penalty * (length - 1).square()
            (free_LD.grad,) = torch.autograd.grad(loss, free_LD)
            optimizer.step()
            with torch.no_grad():
                self._pinned(free_LD, known)
        return free_LD.detach()

    def _moved(self, ids: list[int], x_LD: torch.Tensor, known: Mapping[int, int]) -> torch.Tensor:
        """The vectors, or the embeddings of a text found by discrete moves if their gradient distance is smaller."""
        free = [place for place in range(len(ids)) if place not in known]
        best, cost = ids, self._judged(ids)
        pools = self._pools(best, x_LD)
        for _ in range(self._settings.moves if free else 0):
            tried = self._move(best, free, pools)
            judged = self._judged(tried)
            if judged < cost:
                best, cost, pools = tried, judged, self._pools(tried, x_LD)
        on_tokens_LD = self._embedding_VD[best]
        return on_tokens_LD if self._value(on_tokens_LD) < self._value(x_LD) else x_LD

    def _polished(self, ids: list[int], x_LD: torch.Tensor, known: Mapping[int, int]) -> list[int]:
        """The text after passes over all positions that try every token of the pool and every swap, until none
        improves."""
        cost = self._judged(ids)
        for _ in range(self._settings.sweeps):
            before = cost
            for place in (place for place in range(len(ids)) if place not in known):
                pool = self._pools(ids, x_LD)[place]
                tried = [[*ids[:place], token, *ids[place + 1 :]] for token in pool]
                tried += [_swapped(ids, place, other) for other in range(place) if other not in known]
                judged = [self._judged(one) for one in tried]
                if min(judged) < cost:
                    cost, ids = min(judged), tried[judged.index(min(judged))]
            if cost == before:
                break
        return ids

    def _judged(self, ids: list[int]) -> float:
        fluency = self._settings.fluency * self._text_loss(ids) if self._text_loss else 0.0
        return self._value(self._embedding_VD[ids]) + fluency

    def _pools(self, ids: list[int], x_LD: torch.Tensor) -> list[list[int]]:
        """Token candidates for each position: near the vector, or with the best first-order gain (HotFlip)."""
        on_tokens_LD = self._embedding_VD[ids].clone().requires_grad_()
        (slope_LD,) = torch.autograd.grad(self.distance(on_tokens_LD), on_tokens_LD)
        near_LV = normalize(x_LD, dim=1) @ normalize(self._embedding_VD, dim=1).T
        count = min(POOL_SIZE, len(self._embedding_VD))
        criteria: list[torch.Tensor] = [near_LV, -slope_LD @ self._embedding_VD.T]
        return torch.cat([one_LV.topk(count, dim=1).indices for one_LV in criteria], dim=1).tolist()

    def _move(self, ids: list[int], free: list[int], pools: list[list[int]]) -> list[int]:
        """The text after one random move: two tokens swapped, one shifted, or one replaced by another of its pool."""
        kind = self._random.choice(("swap", "shift", "change", "change"))
        moved = [ids[place] for place in free]
        one, two = self._random.randrange(len(free)), self._random.randrange(len(free))
        if kind == "swap":
            moved[one], moved[two] = moved[two], moved[one]
        elif kind == "shift":
            moved.insert(two, moved.pop(one))
        else:
            moved[one] = self._random.choice(pools[free[one]])
        whole = list(ids)
        for place, token in zip(free, moved, strict=True):
            whole[place] = token
        return whole


def _swapped(ids: list[int], one: int, two: int) -> list[int]:
    swapped = list(ids)
    swapped[one], swapped[two] = swapped[two], swapped[one]
    return swapped


def adapter_gradient(
    model: nn.Module, adapter: Mapping[str, nn.Parameter], labels_L: torch.Tensor, *, signs: bool = False
) -> GradientOf:
    """The gradient of the loss by adapter tensors, as a function of a text's embeddings.

    Args:
        model: the adversary's whole model (public base, shared adapters).
        adapter: the tensors whose update was observed; they must require a gradient.
        labels_L: ``[L]``, ``IGNORED`` (-100) where there is no loss.
        signs: return a smoothed sign of each coordinate, as AdamW's first step does.
    """

    def gradient_of(x_LD: torch.Tensor) -> Tensors:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            loss = model(inputs_embeds=x_LD.unsqueeze(0), labels=labels_L.unsqueeze(0), use_cache=False).loss
            gradient = torch.autograd.grad(loss, list(adapter.values()), create_graph=x_LD.requires_grad)
        if signs:
            gradient = tuple(one / (one.abs() + one.detach().abs().mean() * 0.1) for one in gradient)
        return dict(zip(adapter, gradient, strict=True))

    return gradient_of
