"""Exactly what an adversary sees. An attack gets a view and nothing else; it is filled from captured frames.

==============  ==================================================================================================
``trunk``       each sequence's length, its secured hidden states and loss gradients, its own answers
``trunk+silo``  the same; and, of one colluding silo, the adapters of both ends and as many rows of its own text as
                it cares to push through its own boundary, with what arrived of each, and of its own training steps; to
                identify rows, candidates among which they are
``aggregator``  each silo's update with its round, weight and, pooled with the trunk, lengths; the shared adapters
``outsider``    the final adapters; rows to ask about; of a silo that tells, rows of the same kind
==============  ==================================================================================================

All know the public base model, its tokenizer and the recipe (but for where the silos' files are).

Shapes: L vectors of one sequence that crossed (they may be fewer than its tokens), D their width (it may be less than
the model's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from isthmus.errors import AttackError
from isthmus.recipe import Recipe

Adversary = Literal["trunk", "trunk+silo", "aggregator", "outsider"]
ADVERSARIES: tuple[Adversary, ...] = get_args(Adversary)
Kind = Literal["train", "evaluate", "inference"]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Crossing:
    """One sequence that crossed, decoded from the frames."""

    sender: str
    kind: Kind
    step: int
    """Of training; the session's number of inference."""
    hidden_LD: torch.Tensor
    """As it arrived: clipped, noised, rounded by its codec."""
    answered_LD: torch.Tensor | None = None
    """What the trunk returned for it."""
    gradient_LD: torch.Tensor | None = None
    """The loss gradient that came up."""
    returned_LD: torch.Tensor | None = None
    """The gradient that the trunk returned for bottom."""
    round: int = 0
    """Of the last ``Begin`` before it; 0: none."""
    weight: float | None = None
    """Supervised tokens that the sender claimed for this step and all others of the same commit."""
    forgotten_LD: torch.Tensor | None = None
    """Inference: vectors that crossed and were then taken back (rejected drafts, beams given up), in order."""

    @property
    def length(self) -> int:
        return len(self.hidden_LD)


@dataclass(frozen=True, eq=False)
class Pair:
    """A row of the adversary's own, and what arrived of it."""

    tokens: tuple[int, ...]
    crossing: Crossing
    answer: tuple[int, ...] = ()
    """Where it trained: its answer, which ``tokens`` hold but for the last."""


@dataclass(frozen=True)
class Row:
    """A row in the clear, in tokens, that an adversary has."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Contribution:
    """One silo's adapter update."""

    sender: str
    round: int
    weight: float
    tensors: Tensors
    lengths: tuple[int, ...] = ()
    """Of the sequences behind it that crossed, which the trunk knows, if it pools with the root."""


@dataclass(frozen=True, eq=False)
class View:
    """What one adversary sees. Fields that it does not see are empty."""

    adversary: Adversary
    recipe: Recipe
    """As all parties know it: without the places of the silos' files."""
    folder: Path
    """The public base model and its tokenizer."""
    crossings: tuple[Crossing, ...] = ()
    pairs: tuple[Pair, ...] = ()
    taught: tuple[Pair, ...] = ()
    """Of the colluding silo's training steps, whose gradients came up like everybody's."""
    contributions: tuple[Contribution, ...] = ()
    asked: tuple[Row, ...] = ()
    """Of which it wants to know whether they were trained on, or which of them crossed."""
    own: tuple[Row, ...] = ()
    """To train models of its own on; none of ``asked`` is among them."""
    adapters: Tensors = field(default_factory=dict)
    """The ends' adapters, by uncut name, as far as this adversary knows them."""
    trunk_adapter: Tensors = field(default_factory=dict)

    def needs(self, *fields: str) -> View:
        """This view, if it holds something of each of these.

        Raises:
            AttackError: it does not.
        """
        for name in fields:
            if not getattr(self, name):
                raise AttackError(
                    f"the adversary {self.adversary!r} sees no {name}",
                    remedy="choose another --adversary, or another --attack",
                )
        return self

    def to(self, device: torch.device) -> View:
        """The same, its tensors on this device."""
        moved = {one.name: _moved(getattr(self, one.name), device) for one in fields(self) if one.name != "recipe"}
        return replace(self, **moved)


def trunk_view(
    recipe: Recipe, folder: Path, crossings: tuple[Crossing, ...], pairs: tuple[Pair, ...], trunk_adapter: Tensors
) -> View:
    """Of the trunk alone. Its pairs are public text through a bottom that it made of the public model."""
    return View("trunk", known(recipe), folder, crossings, pairs, trunk_adapter=trunk_adapter)


def colluding_view(
    alone: View,
    pairs: tuple[Pair, ...],
    adapters: Tensors,
    taught: tuple[Pair, ...] = (),
    asked: tuple[Row, ...] = (),
) -> View:
    """Of the trunk with a silo that joined it: that silo's pairs and adapters added, and candidates if it has some."""
    return replace(alone, adversary="trunk+silo", pairs=pairs, adapters=adapters, taught=taught, asked=asked)


def aggregator_view(recipe: Recipe, folder: Path, contributions: tuple[Contribution, ...], shared: Tensors) -> View:
    return View("aggregator", known(recipe), folder, contributions=contributions, adapters=shared)


def outsider_view(
    recipe: Recipe,
    folder: Path,
    adapters: Tensors,
    trunk_adapter: Tensors,
    asked: tuple[Row, ...] = (),
    own: tuple[Row, ...] = (),
) -> View:
    return View("outsider", known(recipe), folder, asked=asked, own=own, adapters=adapters, trunk_adapter=trunk_adapter)


def known(recipe: Recipe) -> Recipe:
    """The recipe without the places of the silos' files."""
    silos = tuple(silo.model_copy(update={"train": "", "held_out": None}) for silo in recipe.silo)
    return recipe.model_copy(update={"silo": silos})


def _moved(seen: Any, device: torch.device) -> Any:
    """What was seen, all tensors in it on this device."""
    if isinstance(seen, torch.Tensor):
        return seen.to(device)
    if isinstance(seen, tuple):
        return tuple(_moved(one, device) for one in seen)
    if isinstance(seen, Mapping):
        return {name: _moved(one, device) for name, one in seen.items()}
    if isinstance(seen, (Crossing, Pair, Contribution)):
        return replace(seen, **{one.name: _moved(getattr(seen, one.name), device) for one in fields(seen)})
    return seen
