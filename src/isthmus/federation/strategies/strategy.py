"""From a round's contributions to the next shared tensors: weighed, made one by a rule, stepped by an optimizer.

Shapes: N contributions, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from isthmus.errors import QuorumError
from isthmus.federation.contribution import Contribution, changes
from isthmus.federation.strategies.neighbours import Bulyan, Krum, Mixed, MultiKrum
from isthmus.federation.strategies.optimizers import optimizer_of
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
from isthmus.recipe import FederationSection
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
    """What one root does with its rounds.

    Where LoRA's A is the same everywhere (FFA-LoRA, Sun et al. 2024), the mean of the changes of B is exact:
    mean(Bᵢ·A) = mean(Bᵢ)·A.
    """

    def __init__(self, section: FederationSection) -> None:
        self._section, self._history = section, History()
        rule = RULES[section.robust.rule]()
        self._rule: Rule = Mixed(rule) if section.robust.mix else rule
        self._optimizer = optimizer_of(section.optimizer)
        self.shares: dict[str, float] = {}
        """What each contribution counted for in the last round, with the sum 1."""

    def next(self, base: Tensors, contributions: Sequence[Contribution]) -> dict[str, torch.Tensor]:
        """The new shared tensors.

        Args:
            base: the shared tensors that the round began with.
            contributions: of those who learned something; of nobody, and nothing changes, the optimizer neither.

        Raises:
            QuorumError: there are too few for the rule, or the trusted one is not among them.
        """
        self.shares = {}
        if not contributions:
            return dict(base)
        ordered = self._admitted(contributions)
        layout = Layout.of(base)
        changes_NP, names = changes(ordered, layout), [one.name for one in ordered]
        shares_N = self._shares(ordered, changes_NP)
        self._history.note(names)
        self.shares = dict(zip(names, shares_N.tolist(), strict=True))
        change_P = self._rule.combine(changes_NP, shares_N, self._section.robust.faults(len(ordered)))
        steps = layout.tensors(self._optimizer.step(change_P))
        return {name: (tensor.double() + steps[name]).to(tensor.dtype) for name, tensor in base.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self._optimizer.state_dict(),
            "history": self._history.state_dict(),
            "rule": self._rule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state.get("optimizer", {}))
        self._history.load_state_dict(state.get("history", {}))
        self._rule.load_state_dict(state.get("rule", {}))

    def _admitted(self, contributions: Sequence[Contribution]) -> list[Contribution]:
        """They all, the trusted one first, if there are enough."""
        count, trusted = len(contributions), self._section.robust.trusted
        robust = self._section.robust
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
        """Of the whole. What somebody says it weighs is a claim like its change: believed of all, or of none."""
        if self._section.robust.active and self._section.weights.claimed:
            return torch.full((len(contributions),), 1 / len(contributions), dtype=torch.float64)
        return shares(self._section, contributions, changes_NP, self._history)
