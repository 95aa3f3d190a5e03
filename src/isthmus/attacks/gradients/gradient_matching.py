"""Text by gradient matching: inputs are sought whose gradient is the one that was seen.

After DLG (Zhu et al. 2019), with the cosine distance of Geiping et al. (2020), and with LAMP's penalty on embeddings
and discrete moves under a language model (Balunović et al. 2022). Where ``dager`` is exact, use that: this is for what
it cannot do (more tokens than the adapter's rank, another optimizer, noise).

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
"""From input embeddings ``[L, D]`` to the gradient that they would have caused, differentiable."""
EXACT = 1e-4
"""A distance that only the right text has."""
POOL = 16
Unlikely = Callable[[Sequence[int]], float]
"""How unlikely a text is: its loss a token by a language model."""


@dataclass(frozen=True)
class Effort:
    """How hard to try."""

    starts: int = 8
    """Random beginnings, of which the best is followed."""
    tries: int = 3
    """Times that this is done anew, unless a match is all but exact."""
    steps: int = 300
    learning_rate: float = 0.1
    every: int = 50
    """Steps between rounds of discrete moves."""
    moves: int = 40
    """Swaps, shifts and changes of tokens tried a round."""
    sweeps: int = 4
    """Times at most that every place is gone through at the end."""
    penalty: float = 0.05
    """Weight of the distance between the embeddings' mean length and the vocabulary's."""
    fluency: float = 0.05
    """Weight of a text's unlikelihood beside the gradient's distance, when moves are compared."""
    seed: int = 0


@dataclass(frozen=True)
class Match:
    ids: list[int]
    distance: float
    """Cosine distance of the gradient that these tokens cause to the one that was seen."""


class GradientMatcher:
    """Seeks one text.

    Who has this: the root (a silo's update stands for its gradient: exactly after one step of SGD, roughly after
    several or with another optimizer), with the public base model and the shared adapters; the trunk's adapters if it
    pools with the trunk. Labels that are choices are tried in turn, and the match with the smallest distance kept.

    Args:
        gradient_of: the adversary's own copy of the model (see ``adapter_gradient``).
        seen: the gradient, or update, by name; its length does not matter, its direction's sign does.
        embedding_VD: the model's.
        unlikely: a language model's opinion of a text; None: moves are judged by the gradient alone.

    Raises:
        DataError: nothing that was seen is among what ``gradient_of`` gives, or all of it is zero.
    """

    def __init__(
        self,
        gradient_of: GradientOf,
        seen: Tensors,
        embedding_VD: torch.Tensor,
        *,
        unlikely: Unlikely | None = None,
        effort: Effort = Effort(),
    ) -> None:
        self._gradient_of, self._effort, self._unlikely = gradient_of, effort, unlikely
        self._seen = {name: tensor.detach().float() for name, tensor in seen.items() if bool(tensor.any())}
        if not self._seen:
            raise DataError("an update of zeros", remedy="give the update of a silo that trained")
        self._embedding_VD = embedding_VD.detach().float()
        self._length = float(self._embedding_VD.norm(dim=1).mean())
        self._random = random.Random(effort.seed)
        self._draw = torch.Generator(CPU).manual_seed(effort.seed)

    def distance(self, x_LD: torch.Tensor) -> torch.Tensor:
        """1 − cosine, the mean over the tensors that were seen; differentiable."""
        found = self._gradient_of(x_LD)
        if missing := sorted(self._seen.keys() - found.keys()):
            raise DataError(f"the model gives no gradient of {missing[0]}", remedy="let its adapters be as the silo's")
        apart = [
            1 - (found[name] * seen).sum() / (found[name].norm() * seen.norm()).clamp_min(1e-30)
            for name, seen in self._seen.items()
        ]
        return torch.stack(apart).mean()

    def match(self, length: int, known: Mapping[int, int] | None = None) -> Match:
        """The best text of this length.

        Args:
            known: tokens that the adversary knows (a prompt template's), by position.
        """
        best = self._try(length, dict(known or {}))
        for _ in range(1, self._effort.tries):
            if best.distance < EXACT:
                break
            best = min(best, self._try(length, dict(known or {})), key=lambda match: match.distance)
        return best

    def _try(self, length: int, known: Mapping[int, int]) -> Match:
        x_LD = min((self._start(length, known) for _ in range(self._effort.starts)), key=self._value)
        for _ in range(0, self._effort.steps, self._effort.every):
            x_LD = self._descend(x_LD, known)
            x_LD = self._moved(self.nearest(x_LD), x_LD, known)
        ids = self._polished(self.nearest(x_LD), x_LD, known)
        return Match(ids, self._value(self._embedding_VD[ids]))

    def nearest(self, x_LD: torch.Tensor) -> list[int]:
        """The token whose embedding points most nearly the way of each vector."""
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
        """Some steps of Adam; the learning rate is a share of the embeddings' own size."""
        size = self._length / x_LD.shape[1] ** 0.5
        free_LD = x_LD.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([free_LD], lr=self._effort.learning_rate * size)
        for _ in range(self._effort.every):
            optimizer.zero_grad()
            length = free_LD.norm(dim=1).mean() / self._length
            loss = self.distance(free_LD) + self._effort.penalty * (length - 1).square()
            (free_LD.grad,) = torch.autograd.grad(loss, free_LD)
            optimizer.step()
            with torch.no_grad():
                self._pinned(free_LD, known)
        return free_LD.detach()

    def _moved(self, ids: list[int], x_LD: torch.Tensor, known: Mapping[int, int]) -> torch.Tensor:
        """The vectors, or the embeddings of the best text near them where those do better."""
        free = [place for place in range(len(ids)) if place not in known]
        best, cost = ids, self._judged(ids)
        pools = self._pools(best, x_LD)
        for _ in range(self._effort.moves if free else 0):
            tried = self._move(best, free, pools)
            judged = self._judged(tried)
            if judged < cost:
                best, cost, pools = tried, judged, self._pools(tried, x_LD)
        on_tokens_LD = self._embedding_VD[best]
        return on_tokens_LD if self._value(on_tokens_LD) < self._value(x_LD) else x_LD

    def _polished(self, ids: list[int], x_LD: torch.Tensor, known: Mapping[int, int]) -> list[int]:
        """Place after place every token of its pool and every swap is tried, until nothing does better."""
        cost = self._judged(ids)
        for _ in range(self._effort.sweeps):
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
        fluency = self._effort.fluency * self._unlikely(ids) if self._unlikely else 0.0
        return self._value(self._embedding_VD[ids]) + fluency

    def _pools(self, ids: list[int], x_LD: torch.Tensor) -> list[list[int]]:
        """For each place, tokens that may belong there: near the vector found, or promising by the slope (HotFlip)."""
        on_tokens_LD = self._embedding_VD[ids].clone().requires_grad_()
        (slope_LD,) = torch.autograd.grad(self.distance(on_tokens_LD), on_tokens_LD)
        near_LV = normalize(x_LD, dim=1) @ normalize(self._embedding_VD, dim=1).T
        count = min(POOL, len(self._embedding_VD))
        found: list[torch.Tensor] = [near_LV, -slope_LD @ self._embedding_VD.T]
        return torch.cat([one_LV.topk(count, dim=1).indices for one_LV in found], dim=1).tolist()

    def _move(self, ids: list[int], free: list[int], pools: list[list[int]]) -> list[int]:
        """Two tokens change places, one goes elsewhere, or one becomes another of its pool."""
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
    """The gradient of the loss by these adapter tensors, as a function of a text's embeddings.

    Args:
        model: the whole model as the adversary holds it (public base, shared adapters).
        adapter: the tensors whose update was seen; they must require a gradient.
        labels_L: ``[L]``, -100 where there is no loss.
        signs: compare with what AdamW's first step makes of it, nearly the sign of every coordinate.
    """

    def gradient_of(x_LD: torch.Tensor) -> Tensors:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            loss = model(inputs_embeds=x_LD.unsqueeze(0), labels=labels_L.unsqueeze(0), use_cache=False).loss
            found = torch.autograd.grad(loss, list(adapter.values()), create_graph=x_LD.requires_grad)
        if signs:
            found = tuple(one / (one.abs() + one.detach().abs().mean() * 0.1) for one in found)
        return dict(zip(adapter, found, strict=True))

    return gradient_of
