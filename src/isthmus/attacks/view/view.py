"""The view of an adversary: everything that it sees, and nothing else. Attacks get their data from a view alone.

==============  ==================================================================================================
``trunk``       each sequence's length, released hidden states, released loss gradients, and the trunk's own results
``trunk+silo``  the same; from one colluding silo: the adapters of bottom and top, its own rows with their crossings
                (as many as it sends through its boundary), and its own training steps; to identify rows, a list of
                candidates
``root+trunk``  as ``trunk``, with a root that lies: the adapters of bottom and top; what crosses under adapters that
                it gives the victim
``aggregator``  each silo's update with round and weight; the shared adapters; pooled with the trunk: sequence lengths
``outsider``    the final adapters; candidates for membership; rows of the same kind from a colluding silo
==============  ==================================================================================================

Every adversary knows the public base model, its tokenizer, and the recipe without the paths of the silos' files.

Shapes: L vectors of one sequence that crossed (with ``boundary.tail`` fewer than its tokens); D their width (with
``boundary.width`` less than the model's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from isthmus.errors import AttackError
from isthmus.recipe import Recipe

Adversary = Literal["trunk", "trunk+silo", "root+trunk", "aggregator", "outsider"]
ADVERSARIES: tuple[Adversary, ...] = get_args(Adversary)
CrossingKind = Literal["train", "evaluate", "inference"]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Crossing:
    """One sequence that crossed the boundary, decoded from the frames. Tensors are fp32."""

    sender: str
    """The silo's name."""
    kind: CrossingKind
    step: int
    """Step number in training, session number in inference."""
    hidden_LD: torch.Tensor
    """The released hidden states: clipped, with noise, rounded by the codec."""
    answered_LD: torch.Tensor | None = None
    """The trunk's result."""
    gradient_LD: torch.Tensor | None = None
    """The released gradient of the loss by the trunk's result."""
    returned_LD: torch.Tensor | None = None
    """The gradient that the trunk returned for bottom."""
    round: int = 0
    """Number of the round; 0: outside a round."""
    weight: float | None = None
    """Number of supervised tokens that the silo's commit states, over all steps of the commit."""
    forgotten_LD: torch.Tensor | None = None
    """Inference: released hidden states that were removed from the cache again (rejected drafts, dropped beams)."""

    @property
    def length(self) -> int:
        """Number of vectors that crossed."""
        return len(self.hidden_LD)


@dataclass(frozen=True, eq=False)
class KnownPair:
    """A row whose tokens the adversary knows, and its crossing: known plaintext."""

    tokens: tuple[int, ...]
    """The row's input tokens."""
    crossing: Crossing
    answer: tuple[int, ...] = ()
    """Training rows: the answer. All its tokens but the last are in ``tokens`` too."""


@dataclass(frozen=True)
class TokenRow:
    """A row whose tokens the adversary knows, without a crossing."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    filler: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ObservedUpdate:
    """One silo's adapter update, decoded from its frame."""

    sender: str
    """The silo's name."""
    round: int
    weight: float
    """Number of supervised tokens behind the update, as the silo states it."""
    tensors: Tensors
    """New adapter minus shared adapter, by uncut name."""
    lengths: tuple[int, ...] = ()
    """Lengths of the sequences behind the update, if the root pools with the trunk."""


@dataclass(frozen=True, eq=False)
class Steering:
    """What a root that lies can do: give the victim adapters, and see what crosses under them."""

    adapters: Tensors
    """All that the root publishes, as of the last round, by uncut name."""
    reach: float | None
    """How far from these the victim accepts others: the L2 norm of the change; None: however far."""
    give: Callable[[Tensors], tuple[Crossing, ...]]
    """Gives the victim these adapters; returns what crosses of its attacked rows. Raises what a victim raises
    that refuses them."""


Lesson = Callable[[Sequence[torch.Tensor], Tensors], list[torch.Tensor]]
"""The gradients that a trunk which lies returns, ``[L, D]`` for each sequence of a training step: from what crossed of
them, and the adapters that the step's round began with, which a colluding silo has, too."""

Hijacking = Callable[[Lesson], tuple[tuple[Crossing, ...], Tensors]]
"""Has the victim train by these gradients in place of the loss's; returns what crosses of its attacked rows afterwards,
and the adapters of bottom and top, which a colluding silo has, too."""


@dataclass(frozen=True, eq=False)
class View:
    """The data that one adversary sees. Fields that it does not see are empty."""

    adversary: Adversary
    recipe: Recipe
    """The recipe without the paths of the silos' files."""
    folder: Path
    """Folder of the public base model and its tokenizer."""
    crossings: tuple[Crossing, ...] = ()
    """The victim's sequences, which are attacked."""
    pairs: tuple[KnownPair, ...] = ()
    """The adversary's own rows with their crossings, to learn the boundary from."""
    training_pairs: tuple[KnownPair, ...] = ()
    """The colluding silo's training rows with their crossings, gradients included."""
    updates: tuple[ObservedUpdate, ...] = ()
    """The victim's adapter updates."""
    candidates: tuple[TokenRow, ...] = ()
    """Membership inference: rows that may be training rows. Identification: rows among which the crossings' are."""
    reference_rows: tuple[TokenRow, ...] = ()
    """Rows for training reference models; no candidate is among them."""
    adapters: Tensors = field(default_factory=dict)
    """The adapters of bottom and top by uncut name, as far as the adversary knows them."""
    trunk_adapter: Tensors = field(default_factory=dict)
    """The trunk's adapter by uncut name, if the adversary knows it."""
    steering: Steering | None = None
    """What the adversary can do as a root that lies."""
    hijacking: Hijacking | None = None
    """What the adversary can do as a trunk that lies."""

    def needs(self, *fields: str) -> View:
        """This view, after a check that none of these fields is empty.

        Raises:
            AttackError: a field is empty.
        """
        for name in fields:
            if not getattr(self, name):
                raise AttackError(
                    f"the adversary {self.adversary!r} sees no {name}",
                    remedy="choose another --adversary, or another --attack",
                )
        return self

    def to(self, device: torch.device) -> View:
        """This view with its tensors on ``device``."""
        moved = {one.name: _moved(getattr(self, one.name), device) for one in fields(self) if one.name != "recipe"}
        return replace(self, **moved)


def trunk_view(
    recipe: Recipe,
    folder: Path,
    crossings: tuple[Crossing, ...],
    pairs: tuple[KnownPair, ...],
    trunk_adapter: Tensors,
) -> View:
    """The view of the trunk alone.

    Args:
        folder: the public base model.
        pairs: public text, crossed by a bottom that the trunk has made from the public model.
    """
    return View("trunk", _without_paths(recipe), folder, crossings, pairs, trunk_adapter=trunk_adapter)


def colluding_view(
    alone: View,
    pairs: tuple[KnownPair, ...],
    adapters: Tensors,
    training_pairs: tuple[KnownPair, ...] = (),
    candidates: tuple[TokenRow, ...] = (),
    hijacking: Hijacking | None = None,
) -> View:
    """The view of the trunk with a colluding silo.

    Args:
        alone: the view of the trunk alone.
        pairs: rows that the silo has sent through its boundary; they replace those of ``alone``.
        adapters: the adapters of bottom and top.
        training_pairs: the silo's own training rows.
        candidates: rows among which the victim's are, for identification.
        hijacking: what the trunk can do if it lies.
    """
    return replace(
        alone,
        adversary="trunk+silo",
        pairs=pairs,
        adapters=adapters,
        training_pairs=training_pairs,
        candidates=candidates,
        hijacking=hijacking,
    )


def steering_view(alone: View, pairs: tuple[KnownPair, ...], adapters: Tensors, steering: Steering) -> View:
    """The view of the trunk with a root that lies.

    Args:
        alone: the view of the trunk alone.
        pairs: the adversary's own text, crossed by a bottom that it has made itself.
        adapters: those of bottom and top after the last finished round; none before the first.
    """
    return replace(alone, adversary="root+trunk", pairs=pairs, adapters=adapters, steering=steering)


def aggregator_view(recipe: Recipe, folder: Path, updates: tuple[ObservedUpdate, ...], shared: Tensors) -> View:
    """The view of the root.

    Args:
        folder: the public base model.
        updates: the victim's updates.
        shared: the adapters of bottom and top at the beginning of the round.
    """
    return View("aggregator", _without_paths(recipe), folder, updates=updates, adapters=shared)


def outsider_view(
    recipe: Recipe,
    folder: Path,
    adapters: Tensors,
    trunk_adapter: Tensors,
    candidates: tuple[TokenRow, ...] = (),
    reference_rows: tuple[TokenRow, ...] = (),
) -> View:
    """The view of an outsider who has the final adapters.

    Args:
        folder: the public base model.
        adapters: the final adapters of bottom and top.
        trunk_adapter: the trunk's final adapter.
        candidates: rows that may be training rows.
        reference_rows: rows for training reference models.
    """
    return View(
        "outsider",
        _without_paths(recipe),
        folder,
        candidates=candidates,
        reference_rows=reference_rows,
        adapters=adapters,
        trunk_adapter=trunk_adapter,
    )


def _without_paths(recipe: Recipe) -> Recipe:
    """The recipe without the paths of the silos' files."""
    silos = tuple(silo.model_copy(update={"train": (), "held_out": None}) for silo in recipe.silo)
    return recipe.model_copy(update={"silo": silos, "partition": None})


def _moved(seen: Any, device: torch.device) -> Any:
    """A field of a view with all its tensors on ``device``."""
    if isinstance(seen, torch.Tensor):
        return seen.to(device)
    if isinstance(seen, tuple):
        return tuple(_moved(one, device) for one in seen)
    if isinstance(seen, Mapping):
        return {name: _moved(one, device) for name, one in seen.items()}
    if isinstance(seen, (Crossing, KnownPair, ObservedUpdate)):
        return replace(seen, **{one.name: _moved(getattr(seen, one.name), device) for one in fields(seen)})
    return seen
