"""What the trunk knows of top's input, and of the loss gradient by it.

Without a residual path top's input is the trunk's own result, exactly. With one (``boundary.residual``) the silo adds
that result, times top's gate, to its clean states, which never crossed: nobody but the silo has them. The best guess
at them is what was received, brought back to the model's width by the trunk's ``up``; with a colluding silo, whose own
clean states are known, it is the regression of its clean states on what arrived of them.

With ``boundary.denoise`` top takes out of it what it makes of its own noise, which nobody else knows: the result as the
trunk sent it is the best guess then.

Silos do not send an answer's last token: nothing follows it. ``lens``, ``labels`` and ``responses`` take rows that
hold it. So a row is added in its place; as top is causal and no loss is there, it changes nothing before it.

Shapes: L vectors of one sequence that crossed, D the model's width, W what crosses of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from isthmus.attacks.inversion.linear import ridge
from isthmus.attacks.knowledge import CALIBRATION, Knowledge, aligned
from isthmus.errors import AttackError
from isthmus.model.bottleneck import GATE, UP, project, tensor_of
from isthmus.privacy.mechanisms import Gaussian, Metric, SequenceGaussian, mechanism_of
from isthmus.recipe import ReleaseSection


@dataclass(frozen=True)
class Noising:
    """How a path is secured, as every party knows it from the recipe."""

    noise: float
    """Standard deviation of a coordinate."""
    clip: float
    of_sequence: bool
    """Whether a sequence's rows are clipped together."""


def noising(section: ReleaseSection, width: int) -> Noising:
    """What this section does to rows of this width."""
    mechanism = mechanism_of(section)
    if isinstance(mechanism, Metric):
        return Noising(math.sqrt(width + 1) / mechanism.epsilon, mechanism.clip, False)
    assert isinstance(mechanism, Gaussian | SequenceGaussian)
    return Noising(mechanism.noise, mechanism.clip, isinstance(mechanism, SequenceGaussian))


def results_of(knowledge: Knowledge) -> list[torch.Tensor]:
    """Top's input for every sequence of the view, ``[L, D]``, as well as this adversary knows it (see above).

    Raises:
        AttackError: the adversary sees no sequences, or not what the trunk returned for them.
    """
    crossings = knowledge.view.needs("crossings").crossings
    answers = [one.answered_LD.float() for one in crossings if one.answered_LD is not None]
    if len(answers) < len(crossings):
        raise AttackError("a sequence that the trunk did not answer", remedy="attack sequences that it did")
    if not knowledge.view.recipe.boundary.residual:
        return answers
    gate_D = tensor_of(knowledge.top, GATE)
    assert gate_D is not None  # a residual path has one
    guessed = _guesser(knowledge)
    return [guessed(one.hidden_LD.float()) + gate_D * g_LD for one, g_LD in zip(crossings, answers, strict=True)]


def gradients_of(knowledge: Knowledge) -> list[torch.Tensor]:
    """The loss gradient by top's input for every sequence of the view, ``[L, D]``, as it came up.

    Raises:
        AttackError: no gradients came up.
    """
    crossings = knowledge.view.needs("crossings").crossings
    if not knowledge.view.recipe.boundary.gradients:
        raise AttackError(
            "no gradients come up: the recipe has boundary.gradients = false",
            remedy="attack what the trunk returned (--attack lens), or the hidden states",
        )
    found = [one.gradient_LD.float() for one in crossings if one.gradient_LD is not None]
    if len(found) < len(crossings):
        raise AttackError("no gradients come up in inference", remedy="leave out --inference, or use --attack lens")
    gate_D = tensor_of(knowledge.top, GATE)
    return found if gate_D is None else [e_LD / gate_D for e_LD in found]


def closed(x_LD: torch.Tensor) -> torch.Tensor:
    """With a row of zeros where an answer's last token would stand, ``[L + 1, D]``."""
    return torch.cat([x_LD, torch.zeros_like(x_LD[:1])])


def _guesser(knowledge: Knowledge) -> partial[torch.Tensor]:
    """From what was received, ``[L, W]``, to the silo's clean states, ``[L, D]``, as well as can be."""
    if knowledge.view.adversary == "trunk+silo" and knowledge.view.pairs:
        pairs = knowledge.view.pairs[:CALIBRATION]
        z_TW, _ = aligned(pairs)
        h_TD = torch.cat([knowledge.bottom_of(pair.tokens)[-pair.crossing.length :] for pair in pairs])
        weight_WD, bias_D = ridge(z_TW, h_TD)
        return partial(_affine, weight_WD=weight_WD, bias_D=bias_D)
    return partial(project, weight=tensor_of(knowledge.trunk, UP))


def _affine(z_LW: torch.Tensor, weight_WD: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor:
    return z_LW @ weight_WD + bias_D
