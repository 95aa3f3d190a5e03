"""An adversary's estimates of top's input and of the loss gradient by it.

Without a residual path top's input is exactly the trunk's result. With one (``boundary.residual``) the silo adds that
result, times top's gate, to its clean hidden states, which never cross. They are estimated from the received ones: by
the trunk's projection ``up`` or, with a colluding silo, by a regression of its clean states on its received ones.

With ``boundary.denoise`` top subtracts an estimate of its own noise, which only the silo knows; the trunk's result is
then the best estimate.

Silos do not send the position of an answer's last token, but ``lens``, ``labels`` and ``gradient_inversion`` expect it.
``closed`` adds a row of zeros there. Top is causal and that position has no loss, so earlier positions do not change.

Shapes: L vectors of one sequence that crossed, D the model's width, W width of a crossing vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from isthmus.attacks.inversion.linear import ridge
from isthmus.attacks.knowledge import CALIBRATION, Knowledge, aligned
from isthmus.errors import AttackError
from isthmus.model.bottleneck import GATE, UP, layer_weight, project
from isthmus.privacy.mechanisms import Gaussian, Metric, SequenceGaussian, mechanism_of
from isthmus.recipe import ReleaseSection


@dataclass(frozen=True)
class PathNoise:
    """Noise and clipping of one path, as every party knows them from the recipe."""

    deviation: float
    """Standard deviation of the noise on a coordinate."""
    clip: float
    """Clipping norm; 0: none."""
    of_sequence: bool
    """Whether the clipping norm is that of a whole sequence, not of each vector."""


def path_noise(section: ReleaseSection, width: int) -> PathNoise:
    """The noise and clipping of a path with vectors of ``width`` coordinates."""
    mechanism = mechanism_of(section)
    if isinstance(mechanism, Metric):
        return PathNoise(math.sqrt(width + 1) / mechanism.epsilon, mechanism.clip, False)
    assert isinstance(mechanism, Gaussian | SequenceGaussian)
    return PathNoise(mechanism.noise, mechanism.clip, isinstance(mechanism, SequenceGaussian))


def results_of(knowledge: Knowledge) -> list[torch.Tensor]:
    """The adversary's best estimate of top's input for every sequence of the view, ``[L, D]`` each.

    Raises:
        AttackError: the view has no sequences, or a sequence without the trunk's result.
    """
    crossings = knowledge.view.needs("crossings").crossings
    answers = [one.answered_LD.float() for one in crossings if one.answered_LD is not None]
    if len(answers) < len(crossings):
        raise AttackError("the trunk did not answer a sequence", remedy="attack sequences that it answered")
    if not knowledge.view.recipe.boundary.residual:
        return answers
    gate_D = layer_weight(knowledge.top, GATE)
    assert gate_D is not None  # a residual path has one
    estimate = _clean_state_estimator(knowledge)
    return [estimate(one.hidden_LD.float()) + gate_D * g_LD for one, g_LD in zip(crossings, answers, strict=True)]


def gradients_of(knowledge: Knowledge) -> list[torch.Tensor]:
    """The received loss gradient by top's input for every sequence of the view, ``[L, D]`` each.

    Raises:
        AttackError: the recipe sends no gradients, or the sequences are of inference.
    """
    crossings = knowledge.view.needs("crossings").crossings
    if not knowledge.view.recipe.boundary.gradients:
        raise AttackError(
            "no gradients cross: the recipe has boundary.gradients = false",
            remedy="use --attack lens, or an attack on hidden states",
        )
    gradients = [one.gradient_LD.float() for one in crossings if one.gradient_LD is not None]
    if len(gradients) < len(crossings):
        raise AttackError("no gradients cross in inference", remedy="leave out --inference, or use --attack lens")
    gate_D = layer_weight(knowledge.top, GATE)
    return gradients if gate_D is None else [e_LD / gate_D for e_LD in gradients]


def closed(x_LD: torch.Tensor) -> torch.Tensor:
    """The rows and a row of zeros for the answer's last token, ``[L + 1, D]``."""
    return torch.cat([x_LD, torch.zeros_like(x_LD[:1])])


def _clean_state_estimator(knowledge: Knowledge) -> partial[torch.Tensor]:
    """A map from received vectors, ``[L, W]``, to estimates of the silo's clean hidden states, ``[L, D]``."""
    if knowledge.view.adversary == "trunk+silo" and knowledge.view.pairs:
        pairs = knowledge.view.pairs[:CALIBRATION]
        z_TW, _ = aligned(pairs)
        h_TD = torch.cat([knowledge.bottom_of(pair.tokens)[-pair.crossing.length :] for pair in pairs])
        weight_WD, bias_D = ridge(z_TW, h_TD)
        return partial(_affine, weight_WD=weight_WD, bias_D=bias_D)
    return partial(project, weight=layer_weight(knowledge.trunk, UP))


def _affine(z_LW: torch.Tensor, weight_WD: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor:
    return z_LW @ weight_WD + bias_D
