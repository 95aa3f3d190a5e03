"""From a round's contributions to the next shared tensors: weighed, made one by a rule, stepped by an optimizer.

Shapes: N contributions, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from isthmus.errors import QuorumError
from isthmus.federation.contribution import Contribution, changes, proportions
from isthmus.federation.strategies.neighbours import Bulyan, Krum, Mixed, MultiKrum
from isthmus.federation.strategies.optimizers import GradientOptimizer, optimizer_of
from isthmus.federation.strategies.rules import (
    CenteredClipping,
    FLTrust,
    GeometricMedian,
    Mean,
    Median,
    NormBound,
    Rule,
    TrimmedMean,
)
from isthmus.federation.strategies.weights import History, shares
from isthmus.recipe import FederationSection, TrainSection
from isthmus.recipe.sections.federation.robust import RuleName
from isthmus.updates.flat import Layout

Tensors = Mapping[str, torch.Tensor]
RULES: dict[RuleName, type[Rule]] = {
    "mean": Mean,
    "norm-bound": NormBound,
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "krum": Krum,
    "multi-krum": MultiKrum,
    "bulyan": Bulyan,
    "geometric-median": GeometricMedian,
    "centered-clipping": CenteredClipping,
    "fltrust": FLTrust,
}


class Strategy:
    """The root's way from a round's contributions to the next shared tensors.

    Where LoRA's A is the same everywhere (FFA-LoRA, Sun et al. 2024), the mean of the changes of B is exact:
    mean(Bᵢ·A) = mean(Bᵢ)·A.

    Args:
        train: where updates are gradients: the optimizer that steps with their mean.
    """

    def __init__(self, section: FederationSection, train: TrainSection | None = None) -> None:
        self._section = section
        self._gradients = GradientOptimizer(train) if train is not None else None
        self._history = History() if section.weights.kind == "quality" else None
        """The silos' participation in earlier rounds, where the weights depend on it."""
        self._robust, self._claimed = section.robust.active, section.weights.claimed
        believed = section.weights.kind == "examples" or section.secure.masks
        self._most = math.inf if believed else 1.0
        """Largest weight that a silo's claim counts for; under masks a cohort's is the sum of its silos' shares."""
        rule = RULES[section.robust.rule]()
        self._rule: Rule = Mixed(rule) if section.robust.mix else rule
        self._optimizer = optimizer_of(section.optimizer)
        self.shares: dict[str, float] = {}
        """Each contribution's part of the last round's change, by name, with the sum 1."""

    def next(self, base: Tensors, contributions: Sequence[Contribution], round: int = 1) -> dict[str, torch.Tensor]:
        """The new shared tensors.

        Args:
            base: the shared tensors that the round began with.
            round: the round's number, for the learning rate of gradients.
            contributions: of those who learned something; of nobody, and nothing changes, the optimizer neither.

        Raises:
            QuorumError: there are too few for the rule, or the trusted one is not among them.
        """
        self.shares = {}
        if not contributions:
            return dict(base)
        ordered = self._admitted(contributions) if self._robust else contributions
        faults = self._section.robust.faults(len(ordered)) if self._robust else 0
        layout = Layout.of(base)
        changes_NP, names = changes(ordered, layout), [one.name for one in ordered]
        shares_N = self._shares(ordered, changes_NP)
        if self._history is not None:
            self._history.note(names)
        self.shares = dict(zip(names, shares_N.tolist(), strict=True))
        change_P = self._rule.combine(changes_NP, shares_N, faults)
        if self._gradients is not None:
            return self._gradients.step(base, layout.tensors(change_P), round)
        if self._optimizer is not None:
            change_P = self._optimizer.step(change_P)
        steps = layout.tensors(change_P)
        return {name: (tensor.double() + steps[name]).to(tensor.dtype) for name, tensor in base.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts():
            part.load_state_dict(state.get(name, {}))

    def _parts(self) -> Iterator[tuple[str, Any]]:
        """What remembers earlier rounds, by name."""
        optimizer = self._gradients or self._optimizer
        named = {"optimizer": optimizer, "history": self._history, "rule": self._rule}
        return ((name, part) for name, part in named.items() if part is not None)

    def _admitted(self, contributions: Sequence[Contribution]) -> list[Contribution]:
        """All contributions, the trusted one first.

        Raises:
            QuorumError: they are too few for the rule, or the trusted one is not among them.
        """
        robust, count = self._section.robust, len(contributions)
        trusted = robust.trusted
        if count < robust.fewest(count):
            raise QuorumError(
                f"{count} silos learned something, the rule {robust.rule!r} needs "
                f"{robust.fewest(count)} to bear {robust.faults(count)} that may be malicious",
                remedy="start the missing silos, then 'isthmus run --resume'; or begin a run with another rule",
            )
        if trusted and all(one.name != trusted for one in contributions):
            raise QuorumError(
                f"the trusted silo {trusted!r} learned nothing",
                remedy=f"start {trusted!r} again, then continue with 'isthmus run --resume'",
            )
        return sorted(contributions, key=lambda one: one.name != trusted)

    def _shares(self, contributions: Sequence[Contribution], changes_NP: torch.Tensor) -> torch.Tensor:
        """Each contribution's part of the whole, fp64, N, with the sum 1.

        The weight that a silo claims is believed as its change is: a robust rule counts all alike.
        """
        if not self._claimed:
            return shares(self._section.weights, contributions, changes_NP, self._history)
        if self._robust:
            return torch.full((len(contributions),), 1 / len(contributions), dtype=torch.float64)
        return proportions(contributions, self._most)
