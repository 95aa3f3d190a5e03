"""Text recovery from a silo's update: DAGER and gradient matching.

Adversary: the root, with the public base model and the shared adapters at the beginning of the round; pooled with the
trunk, also with the lengths of the sequences behind the update. The trunk's adapter is taken at its initial value.

Shapes: L positions of one text, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median_low

import torch

from isthmus.attacks.gradients.dager import ExactSearch
from isthmus.attacks.gradients.gradient_matching import (
    EXACT_DISTANCE,
    GradientMatcher,
    GradientOf,
    Match,
    MatcherSettings,
    Tensors,
    adapter_gradient,
)
from isthmus.attacks.gradients.top_input import path_noise
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.recovered import RecoveredTexts
from isthmus.attacks.view.view import ObservedUpdate
from isthmus.attacks.whole_model import WholeModel
from isthmus.errors import AttackError, DataError
from isthmus.model.crossing import IGNORED
from isthmus.recipe import Recipe

FLOAT32_ROUNDING = 6e-8
"""Rounding error of an update, a difference of float32 values, as a share of the adapter's largest value."""
NOISY_TOLERANCE = 0.05
"""DAGER's tolerance for updates with noise."""
SETTINGS = MatcherSettings()
"""Default settings of gradient matching."""
LIKELIEST_TOKENS = 32
"""Number of tokens that DAGER returns if it recovers neither texts nor exact tokens."""


def run_dager(knowledge: Knowledge) -> RecoveredTexts:
    """DAGER: the texts of the silo's batch or, if there are none, its tokens.

    Raises:
        AttackError: the view has no update, or the update has no tensor of the first block's adapter.
    """
    recipe, observed = knowledge.view.recipe, _first_update(knowledge)
    noise = path_noise(recipe.boundary.update, 1).deviation
    rounding = FLOAT32_ROUNDING * max((float(one.abs().max()) for one in knowledge.view.adapters.values()), default=0.0)
    try:
        search = ExactSearch(
            knowledge.bottom, observed.tensors, noise=noise + rounding, tolerance=NOISY_TOLERANCE if noise else 1e-2
        )
    except DataError as error:
        raise AttackError(f"{error.message} in the update", remedy="use --attack gradient-matching") from error
    steps = recipe.train.steps if recipe.train.epochs is None else None
    notes = tuple(search.obstacles(steps=steps, optimizer="sgd" if recipe.sends_gradients else recipe.train.optimizer))
    whole = recipe.boundary.tail is None and bool(observed.lengths)
    texts = search.sequences(longest=max(observed.lengths) if whole else recipe.train.max_tokens)
    return RecoveredTexts(texts or [search.tokens() or search.tokens(LIKELIEST_TOKENS)], notes)


def match_gradients(knowledge: Knowledge, settings: MatcherSettings | None = None) -> RecoveredTexts:
    """Gradient matching: one text whose gradient is nearest to the update.

    Each choice is tried as the answer. With free text the labels are the current tokens of the answer. If the gradient
    alone gives no exact match, a second search adds the public model's loss of the text.

    Args:
        settings: of the search; None: ``SETTINGS``.

    Raises:
        AttackError: the view has no update, or no sequence lengths.
    """
    observed, settings = _first_update(knowledge), settings or SETTINGS
    if not observed.lengths:
        raise AttackError("no sequence length of the update is known", remedy="attack a silo that trained")
    best: Match | None = None
    answers: list[list[int] | None] = [*knowledge.choices] or [None]
    for current in (replace(settings, fluency=0.0), settings):
        for answer in answers:
            match = _matched(knowledge, observed, answer, current)
            best = match if best is None or match.distance < best.distance else best
            if best.distance < EXACT_DISTANCE:
                break
        else:
            continue
        break
    assert best is not None
    return RecoveredTexts(
        [best.ids], (*_obstacles(knowledge, observed), f"the best text's gradient is {best.distance:.2g} away")
    )


def _first_update(knowledge: Knowledge) -> ObservedUpdate:
    """The first update that has tensors."""
    for one in knowledge.view.needs("updates").updates:
        if one.tensors:
            return one
    raise AttackError("the silo sent no update", remedy="attack a silo whose privacy budget allows an update")


def _obstacles(knowledge: Knowledge, observed: ObservedUpdate) -> list[str]:
    """Reasons why the update is not the gradient of one text, for people."""
    recipe = knowledge.view.recipe
    train, update = recipe.train, recipe.boundary.update
    reasons = []
    if len(observed.lengths) > 1:
        reasons.append(f"the update is of {len(observed.lengths)} rows: one text of the median length is searched for")
    if train.steps > 1 or train.epochs is not None:
        steps = "several" if train.epochs is not None else train.steps
        reasons.append(f"{steps} steps: the update is their sum, not one gradient")
    if _scaled(recipe):
        reasons.append(f"{train.optimizer} scales each coordinate on its own: signs are compared, as after one step")
    if train.sharpness:
        reasons.append("the silo took its gradients at ascended adapters (train.sharpness), not at the shared ones")
    if recipe.federation.control != "none":
        reasons.append("the update includes the silo's control correction (federation.control)")
    if path_noise(update, 1).deviation:
        reasons.append("the update has noise")
    return reasons


def _matched(
    knowledge: Knowledge, observed: ObservedUpdate, answer: Sequence[int] | None, settings: MatcherSettings
) -> Match:
    whole = WholeModel(knowledge).eval()
    own = whole.adapter()
    update = {name: -tensor for name, tensor in observed.tensors.items() if _learns(knowledge, name)}
    length = median_low(observed.lengths) + 1  # an answer's last token does not cross
    if answer is None:
        count = min(max(1, round(observed.weight / len(observed.lengths))), length - 1)
        known = {} if knowledge.ending is None else {length - 1: knowledge.ending}
    else:
        count = len(answer)
        length -= max(map(len, knowledge.choices)) - count  # without the filler after a shorter choice
        known = {length - count + place: token for place, token in enumerate(answer)}

    def labelled(x_LD: torch.Tensor) -> torch.Tensor:
        labels_L = torch.full((length,), IGNORED)
        labels_L[length - count :] = torch.tensor(matcher.nearest(x_LD[length - count :]))
        for place, token in known.items():
            labels_L[place] = token
        return labels_L

    wanted = {name: own[name] for name in update}
    gradient_of = _by_labels(whole, wanted, labelled, signs=_scaled(knowledge.view.recipe))
    text_loss = _text_loss_of(knowledge) if settings.fluency else None
    matcher = GradientMatcher(gradient_of, update, knowledge.embedding, text_loss=text_loss, settings=settings)
    return matcher.match(length, known)


def _scaled(recipe: Recipe) -> bool:
    """Whether an update of one step is a gradient whose coordinates the silo's optimizer has scaled."""
    return recipe.train.optimizer != "sgd" and not recipe.sends_gradients


def _learns(knowledge: Knowledge, name: str) -> bool:
    """Whether a tensor gets a gradient. If the trunk returns no gradients, the projection into it gets none."""
    return knowledge.view.recipe.boundary.gradients or not name.startswith("boundary_down")


def _by_labels(
    whole: WholeModel,
    adapter: Mapping[str, torch.nn.Parameter],
    labelled: Callable[[torch.Tensor], torch.Tensor],
    *,
    signs: bool,
) -> GradientOf:
    """The gradient as a function of a text whose labels are its own nearest tokens."""

    def gradient_of(x_LD: torch.Tensor) -> Tensors:
        return adapter_gradient(whole, adapter, labelled(x_LD), signs=signs)(x_LD)

    return gradient_of


def _text_loss_of(knowledge: Knowledge) -> Callable[[Sequence[int]], float]:
    @torch.no_grad()
    def text_loss(ids: Sequence[int]) -> float:
        ids_1L = torch.tensor([list(ids)])
        return float(knowledge.language_model(input_ids=ids_1L, labels=ids_1L).loss)

    return text_loss
