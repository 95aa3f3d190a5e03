"""Labels and answers from the trunk's view: from the loss gradients that it receives and from its own results.

Adversary: the trunk with the public model's top; with a colluding silo, with the shared adapters and that silo's
labelled gradients. ``top_input`` describes the estimates of top's input.

Shapes: N sequences, L vectors of one sequence that crossed, D width, S supervised positions, V vocabulary.
"""

from __future__ import annotations

import torch

from isthmus.attacks.gradients.gradient_inversion import GradientDefence, GradientInverter, logit_lens
from isthmus.attacks.gradients.labels import LabelClassifier, answer_gradients, cluster_labels, match_choices
from isthmus.attacks.gradients.lens import Lens
from isthmus.attacks.gradients.top_input import PathNoise, closed, gradients_of, path_noise, results_of
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.recovered import LabelGuesses, RecoveredTokens
from isthmus.attacks.score import ABSENT
from isthmus.errors import AttackError, DataError

SCALE_ROUNDS = 3
"""Estimates of a sequence's gradient norm before clipping, where whole sequences are clipped."""


def infer_labels(knowledge: Knowledge) -> LabelGuesses:
    """The label of every sequence from its received gradient, where answers are choices.

    Methods: ``choices`` computes each choice's gradient through top. ``classifier`` is trained on the colluder's
    gradients. ``clusters`` needs no weights; it does not know which cluster is which label.

    Raises:
        AttackError: the view has no gradients, or answers are free text.
    """
    gradients = gradients_of(knowledge)
    choices = knowledge.choices
    if not choices:
        raise AttackError("answers are free text: the recipe has no task.choices", remedy="use --attack responses")
    at_answers_ND = _at_answers(gradients, choices)
    guesses, notes = {"choices": _matched(knowledge, gradients, choices)}, []
    if len(gradients) >= len(choices):
        guesses["clusters"] = cluster_labels(at_answers_ND, len(choices))
    if knowledge.view.training_pairs:
        try:
            guesses["classifier"] = _classifier(knowledge, choices).predict(at_answers_ND)
        except DataError as error:
            notes.append(f"no classifier: {error.message}")
    return LabelGuesses(guesses, frozenset({"clusters"}), tuple(notes))


def read_logit_lens(knowledge: Knowledge) -> LabelGuesses | RecoveredTokens:
    """The label of every sequence, or its answer (inference, free text), by top's prediction from the trunk's result.

    Raises:
        AttackError: the view has no sequences.
    """
    results = results_of(knowledge)
    inference = any(one.kind == "inference" for one in knowledge.view.crossings)
    choices = knowledge.choices
    if choices and not inference:
        return LabelGuesses({"lens": [_likeliest_choice(knowledge, g_LD, choices) for g_LD in results]})
    return RecoveredTokens(
        [[ABSENT, *logit_lens(knowledge.top, g_LD)[:, 0].tolist()] for g_LD in results], response=True
    )


def recover_responses(knowledge: Knowledge) -> RecoveredTokens:
    """The answer of every sequence by inversion of its received gradient. The answer's beginning is estimated too.

    Raises:
        AttackError: the view has no gradients.
    """
    gradients, results = gradients_of(knowledge), results_of(knowledge)
    crossings = knowledge.view.crossings
    return RecoveredTokens(
        [
            _response(knowledge, closed(g_LD), closed(e_LD), one.weight or 1.0)
            for one, g_LD, e_LD in zip(crossings, results, gradients, strict=True)
        ],
        response=True,
    )


def _at_answers(gradients: list[torch.Tensor], choices: list[list[int]]) -> torch.Tensor:
    """Each row's gradient at the beginning of its answer, which is filled up to the longest, ``[N, D]``."""
    rows = [closed(e_LD) for e_LD in gradients]
    return answer_gradients(torch.cat(rows), [len(row) for row in rows], max(map(len, choices)))


def _classifier(knowledge: Knowledge, choices: list[list[int]]) -> LabelClassifier:
    """A classifier trained on the colluding silo's gradients."""
    pairs = [pair for pair in knowledge.view.training_pairs if pair.crossing.gradient_LD is not None]
    gradients = [pair.crossing.gradient_LD.float() for pair in pairs if pair.crossing.gradient_LD is not None]
    labels = [choices.index(list(pair.answer)) for pair in pairs]
    return LabelClassifier(_at_answers(gradients, choices), labels)


def _matched(knowledge: Knowledge, gradients: list[torch.Tensor], choices: list[list[int]]) -> list[int]:
    """The choice with the nearest gradient; compared by direction alone if top's input is estimated, or if whole
    sequences are clipped."""
    noise = _gradient_noise(knowledge, gradients[0].shape[1])
    boundary = knowledge.view.recipe.boundary
    inexact = noise.of_sequence or boundary.residual or boundary.denoise
    return [
        match_choices(
            knowledge.top,
            closed(g_LD),
            closed(e_LD),
            choices,
            weight=None if inexact else one.weight,
            clip=noise.clip,
        )
        for one, g_LD, e_LD in zip(knowledge.view.crossings, results_of(knowledge), gradients, strict=True)
    ]


@torch.no_grad()
def _likeliest_choice(knowledge: Knowledge, g_LD: torch.Tensor, choices: list[list[int]]) -> int:
    """The index of the choice with the largest log-probability by top."""
    logits_LV = knowledge.top.model(inputs_embeds=g_LD.unsqueeze(0), use_cache=False).logits[0]
    log_probabilities_LV = logits_LV.float().log_softmax(dim=1)
    answer_KV = log_probabilities_LV[len(g_LD) - max(map(len, choices)) :]  # with filler after a shorter choice
    likelihoods = [
        float(answer_KV[: len(choice)].gather(1, torch.tensor(choice).unsqueeze(1)).sum()) for choice in choices
    ]
    return max(range(len(choices)), key=likelihoods.__getitem__)


def _response(knowledge: Knowledge, g_LD: torch.Tensor, e_LD: torch.Tensor, weight: float) -> list[int]:
    """One row's guess, ``ABSENT`` outside the answer."""
    noise = _gradient_noise(knowledge, e_LD.shape[1])
    at_S, token_S = _inverted(knowledge, g_LD, e_LD, weight, noise)
    guess = [ABSENT] * len(e_LD)
    for place, token in zip(at_S.tolist(), token_S.tolist(), strict=True):
        guess[place + 1] = token
    return guess


def _inverted(
    knowledge: Knowledge, g_LD: torch.Tensor, e_LD: torch.Tensor, weight: float, noise: PathNoise
) -> tuple[torch.Tensor, torch.Tensor]:
    """The supervised positions and the tokens that follow them. If whole sequences are clipped, the gradient's norm
    before clipping is estimated in turn with the tokens."""
    scale = 1.0
    for _ in range(SCALE_ROUNDS if noise.of_sequence else 1):
        defence = GradientDefence(weight * scale, noise.deviation, 0.0 if noise.of_sequence else noise.clip)
        inverter = GradientInverter(knowledge.top, g_LD, e_LD, defence, ending=knowledge.ending)
        at_S = inverter.supervised()
        token_S = inverter.recover(at_S)
        if noise.of_sequence:
            expected_LD = Lens(knowledge.top, g_LD).gradient(at_S, token_S, weight)
            scale = max(1.0, float(expected_LD.norm()) / noise.clip)
    return at_S, token_S


def _gradient_noise(knowledge: Knowledge, width: int) -> PathNoise:
    return path_noise(knowledge.view.recipe.boundary.gradient, width)
