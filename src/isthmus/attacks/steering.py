"""Steering: adapters that make what crosses tell an attribute of its text.

Adversary: the trunk with a root that lies. Bottom and bottleneck are public but for their adapters, and these come from
the root. It trains them on text of its own until one vector that crosses, clipped and noised as the recipe says, tells
whether a row has a token of a certain list; gives them to the victim as the next round's; and reads the vectors that
cross under them. The same reader of unsteered vectors is the baseline.

Shapes: B rows, T tokens of the longest, E width of the model, D width of a crossing vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.recovered import AttributeGuesses
from isthmus.attacks.view.view import Crossing
from isthmus.model import adapters, bottleneck
from isthmus.model.cut import Part

Row = tuple[int, ...]
STEPS, ROWS, RATE = 400, 64, 0.01
"""Steps of Adam, rows in each, and its learning rate."""


@dataclass(frozen=True)
class Attribute:
    """Whether a row has one of these tokens before its last one, whose vector is read."""

    tokens: frozenset[int]

    def of(self, row: Sequence[int]) -> bool:
        return not self.tokens.isdisjoint(row[:-1])


def halving_attribute(rows: Sequence[Row]) -> Attribute:
    """The attribute of close to half of the rows: of the tokens, the most frequent first, those that
    do not bring it above."""
    counts: dict[int, int] = {}
    for row in rows:
        for token in set(row[:-1]):
            counts[token] = counts.get(token, 0) + 1
    chosen, held = frozenset[int](), 0
    for token in sorted(counts, key=lambda one: (-counts[one], one)):
        more = chosen | {token}
        holding = sum(map(Attribute(more).of, rows))
        if held < holding <= len(rows) / 2:
            chosen, held = more, holding
    return Attribute(chosen)


class AttributeReader(nn.Module):
    """A linear reader of one crossing vector: positive if its row has the attribute.

    Args:
        scale: typical size of a number in the vectors.
    """

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(()))
        self._scale = scale

    def forward(self, z_BD: torch.Tensor) -> torch.Tensor:
        """The logit of each vector, ``[B]``."""
        return z_BD / self._scale @ self.weight_D + self.bias

    @torch.no_grad()
    def read(self, crossings: Sequence[Crossing]) -> list[bool]:
        """The attribute of each crossing's row, from its last vector alone."""
        found: list[bool] = (self(torch.stack([one.hidden_LD[-1].float() for one in crossings])) > 0).tolist()
        return found


@dataclass(frozen=True)
class Craft:
    """A bottom trained for a reader, and the reader trained with it."""

    bottom: Part
    reader: AttributeReader
    tensors: Mapping[str, torch.Tensor]
    """The tensors of bottom that were trained, by uncut name."""


def steer(knowledge: Knowledge) -> AttributeGuesses:
    """Whether each attacked row has the attribute, read from one vector: steered, and without steering."""
    view = knowledge.view.needs("crossings", "pairs", "steering")
    assert view.steering is not None
    rows = [pair.tokens for pair in view.pairs]
    attribute, reach = halving_attribute(rows), view.steering.reach
    plain = craft(knowledge, rows, attribute, moves=False)
    steered = craft(knowledge, rows, attribute, reach=reach)
    crossings = view.steering.give({**view.steering.adapters, **steered.tensors})
    moved = math.sqrt(
        sum(float((one - view.steering.adapters[name]).square().sum()) for name, one in steered.tensors.items())
    )
    allowed = "without a bound" if reach is None else f"of {reach:.3g} that the silo accepts"
    return AttributeGuesses(
        {"steered": steered.reader.read(crossings), "unsteered": plain.reader.read(view.crossings)},
        attribute.tokens,
        (f"adapters moved by {moved:.3g} {allowed}",),
    )


def craft(
    knowledge: Knowledge, rows: Sequence[Row], attribute: Attribute, *, reach: float | None = None, moves: bool = True
) -> Craft:
    """Train bottom's adapters and a reader on these rows, so that the reader tells the attribute.

    Args:
        reach: largest L2 norm of the change of all of bottom's tensors together; None: any.
        moves: False: only the reader is trained.
    """
    bottom, draw = knowledge.equipped("bottom"), torch.Generator().manual_seed(knowledge.view.recipe.seed)
    moving = adapters.trainable(bottom) if moves else {}
    start = {name: one.detach().clone() for name, one in moving.items()}
    has_N = torch.tensor([float(attribute.of(row)) for row in rows])
    with torch.no_grad():
        first_BD = crossing_vectors(knowledge, bottom, rows[:ROWS])
    reader = AttributeReader(first_BD.shape[1], float(first_BD.square().mean().sqrt().clamp_min(1e-12)))
    optimizer = torch.optim.Adam([*moving.values(), *reader.parameters()], lr=RATE)
    for _ in range(STEPS):
        chosen = torch.randint(len(rows), (min(ROWS, len(rows)),), generator=draw).tolist()
        with torch.set_grad_enabled(bool(moving)):
            z_BD = crossing_vectors(knowledge, bottom, [rows[number] for number in chosen])
        z_BD = z_BD + noise_of(knowledge) * torch.randn(z_BD.shape, generator=draw)
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(reader(z_BD), has_N[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _project(moving, start, reach)
    return Craft(bottom.requires_grad_(False), reader, {name: one.detach() for name, one in moving.items()})


def crossing_vectors(knowledge: Knowledge, bottom: Part, rows: Sequence[Row]) -> torch.Tensor:
    """The last vector of each row as it crosses without noise, ``[B, D]``."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    h_BTE = bottom.hidden(input_ids=ids_BT, use_cache=False)  # causal: what follows a row does not change it
    h_BE = h_BTE[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
    z_BD = bottleneck.project(h_BE, bottleneck.layer_weight(bottom, bottleneck.DOWN))
    clip = knowledge.view.recipe.boundary.forward.clip
    return z_BD * (clip / z_BD.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0) if clip else z_BD


def noise_of(knowledge: Knowledge) -> float:
    """Standard deviation of the noise in what crosses: the recipe's, or as the adversary's own rows show it."""
    forward = knowledge.view.recipe.boundary.forward
    return forward.noise if forward.mechanism == "gaussian" else math.sqrt(knowledge.boundary_map.variance)


@torch.no_grad()
def _project(moving: Mapping[str, nn.Parameter], start: Mapping[str, torch.Tensor], reach: float | None) -> None:
    """Bring the tensors back to within ``reach`` of where they started."""
    if reach is None or not moving:
        return
    moved = math.sqrt(sum(float((one - start[name]).square().sum()) for name, one in moving.items()))
    if moved > reach:
        for name, one in moving.items():
            one.copy_(start[name] + (one - start[name]) * (reach / moved))
