"""Labels and responses out of a trunk's view: by the gradients that came up, and by what it returned itself.

Who has this: the trunk, with the public base model's top; together with a colluding silo, with the shared adapters and
that silo's labelled gradients. What it takes for top's input, and what it cannot know of it, says ``returned``.

Shapes: L vectors of one sequence that crossed, D width, S supervised positions.
"""

from __future__ import annotations

import torch

from isthmus.attacks.found import Labels, Tokens
from isthmus.attacks.gradients.labels import LabelClassifier, answer_gradients, cluster_labels, match_choices
from isthmus.attacks.gradients.lens import Lens
from isthmus.attacks.gradients.responses import Defence, GradientInverter, read_ahead
from isthmus.attacks.gradients.returned import Noising, closed, gradients_of, noising, results_of
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.score import ABSENT
from isthmus.errors import AttackError, DataError

ROUNDS = 3
"""Times that a sequence's scale is estimated anew where the whole of it is clipped."""


def find_labels(knowledge: Knowledge) -> Labels:
    """The label of every sequence, where answers are choices, from the gradient that came up for it.

    ``choices`` works out every choice's gradient through top; ``classifier`` learns from the colluder's; ``clusters``
    needs no weights, and does not know which group is which label.

    Raises:
        AttackError: no gradients come up, or answers are free text.
    """
    gradients = gradients_of(knowledge)
    choices = knowledge.choices
    if not choices:
        raise AttackError("answers are no choices: the recipe has no task.choices", remedy="use --attack responses")
    at_answers_ND = _at_answers(gradients, choices)
    found, notes = {"choices": _matched(knowledge, gradients, choices)}, []
    if len(gradients) >= len(choices):
        found["clusters"] = cluster_labels(at_answers_ND, len(choices))
    if knowledge.view.taught:
        try:
            found["classifier"] = _learned(knowledge, choices).predict(at_answers_ND)
        except DataError as error:
            notes.append(f"no classifier: {error.message}")
    return Labels(found, frozenset({"clusters"}), tuple(notes))


def read_returned(knowledge: Knowledge) -> Labels | Tokens:
    """Every sequence's label, or in inference and with free text its response, off what the trunk returned.

    Raises:
        AttackError: the adversary sees no sequences.
    """
    results = results_of(knowledge)
    inference = any(one.kind == "inference" for one in knowledge.view.crossings)
    choices = knowledge.choices
    if choices and not inference:
        return Labels({"lens": [_expected(knowledge, g_LD, choices) for g_LD in results]})
    return Tokens([[ABSENT, *read_ahead(knowledge.top, g_LD)[:, 0].tolist()] for g_LD in results], response=True)


def recover_responses(knowledge: Knowledge) -> Tokens:
    """The answer of every sequence, solved from the gradient that came up; where it begins is estimated too.

    Raises:
        AttackError: no gradients come up.
    """
    gradients, results = gradients_of(knowledge), results_of(knowledge)
    crossings = knowledge.view.crossings
    return Tokens(
        [
            _response(knowledge, closed(g_LD), closed(e_LD), one.weight or 1.0)
            for one, g_LD, e_LD in zip(crossings, results, gradients, strict=True)
        ],
        response=True,
    )


def _at_answers(gradients: list[torch.Tensor], choices: list[list[int]]) -> torch.Tensor:
    """Where an answer as short as any would begin, ``[N, D]``."""
    rows = [closed(e_LD) for e_LD in gradients]
    return answer_gradients(torch.cat(rows), [len(row) for row in rows], min(map(len, choices)))


def _learned(knowledge: Knowledge, choices: list[list[int]]) -> LabelClassifier:
    """From the colluding silo's own gradients."""
    taught = [pair for pair in knowledge.view.taught if pair.crossing.gradient_LD is not None]
    gradients = [pair.crossing.gradient_LD.float() for pair in taught if pair.crossing.gradient_LD is not None]
    labels = [choices.index(list(pair.answer)) for pair in taught]
    return LabelClassifier(_at_answers(gradients, choices), labels)


def _matched(knowledge: Knowledge, gradients: list[torch.Tensor], choices: list[list[int]]) -> list[int]:
    """The nearest choice; where top's input is only guessed, or a sequence's scale is lost, by direction alone."""
    how = _gradient_noising(knowledge, gradients[0].shape[1])
    boundary = knowledge.view.recipe.boundary
    inexact = how.of_sequence or boundary.residual or boundary.denoise
    return [
        match_choices(
            knowledge.top,
            closed(g_LD),
            closed(e_LD),
            choices,
            weight=None if inexact else one.weight,
            clip=how.clip,
        )
        for one, g_LD, e_LD in zip(knowledge.view.crossings, results_of(knowledge), gradients, strict=True)
    ]


@torch.no_grad()
def _expected(knowledge: Knowledge, g_LD: torch.Tensor, choices: list[list[int]]) -> int:
    """The choice that top itself finds likeliest."""
    logits_LV = knowledge.top.model(inputs_embeds=g_LD.unsqueeze(0), use_cache=False).logits[0]
    told_LV = logits_LV.float().log_softmax(dim=1)
    likelihoods = [
        float(told_LV[len(told_LV) - len(choice) :].gather(1, torch.tensor(choice).unsqueeze(1)).sum())
        for choice in choices
    ]
    return max(range(len(choices)), key=likelihoods.__getitem__)


def _response(knowledge: Knowledge, g_LD: torch.Tensor, e_LD: torch.Tensor, weight: float) -> list[int]:
    """One row's guess, ``ABSENT`` where it says nothing."""
    how = _gradient_noising(knowledge, e_LD.shape[1])
    at_S, token_S = _solved(knowledge, g_LD, e_LD, weight, how)
    guess = [ABSENT] * len(e_LD)
    for place, token in zip(at_S.tolist(), token_S.tolist(), strict=True):
        guess[place + 1] = token
    return guess


def _solved(
    knowledge: Knowledge, g_LD: torch.Tensor, e_LD: torch.Tensor, weight: float, how: Noising
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where answers' tokens follow, and which; where whole sequences are clipped, with the scale that fits them."""
    scale = 1.0
    for _ in range(ROUNDS if how.of_sequence else 1):
        defence = Defence(weight * scale, how.noise, 0.0 if how.of_sequence else how.clip)
        inverter = GradientInverter(knowledge.top, g_LD, e_LD, defence, ending=knowledge.ending)
        at_S = inverter.supervised()
        token_S = inverter.recover(at_S)
        if how.of_sequence:
            due_LD = Lens(knowledge.top, g_LD).gradient(at_S, token_S, weight)
            scale = max(1.0, float(due_LD.norm()) / how.clip)
    return at_S, token_S


def _gradient_noising(knowledge: Knowledge, width: int) -> Noising:
    return noising(knowledge.view.recipe.boundary.gradient, width)
