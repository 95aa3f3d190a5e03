"""Text out of a silo's update: exact search, and gradient matching where that cannot be.

Who has this: the root, with the public base model and the shared adapters as the round began; pooled with the trunk
also the lengths of the sequences behind the update. The trunk's adapter it takes as the recipe starts it.

Shapes: L positions of one text, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median_low

import torch

from isthmus.attacks.found import Texts
from isthmus.attacks.gradients.dager import ExactSearch
from isthmus.attacks.gradients.gradient_matching import (
    EXACT,
    Effort,
    GradientMatcher,
    GradientOf,
    Match,
    Tensors,
    adapter_gradient,
)
from isthmus.attacks.gradients.returned import noising
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import Contribution
from isthmus.attacks.whole import IGNORED, Whole
from isthmus.errors import AttackError, DataError

ROUNDING = 6e-8
"""Of a float32, as a share of the adapter's largest value: an update is a difference of two of them."""
NOISED = 0.05
"""How far outside a span an input may lie where there is noise."""
EFFORT = Effort()
BAG = 32
"""Likeliest tokens that are given out where no text can be built of them."""


def search_exactly(knowledge: Knowledge) -> Texts:
    """The texts of the silo's batch, or as many of their tokens as can be told; and what stands in the way.

    Raises:
        AttackError: the adversary sees no update, or none of the first block's adapter.
    """
    recipe, seen = knowledge.view.recipe, _contribution(knowledge)
    noise = noising(recipe.boundary.update, 1).noise
    rounding = ROUNDING * max((float(one.abs().max()) for one in knowledge.view.adapters.values()), default=0.0)
    try:
        search = ExactSearch(
            knowledge.bottom, seen.tensors, noise=noise + rounding, tolerance=NOISED if noise else 1e-2
        )
    except DataError as error:
        raise AttackError(f"{error.message} in the update", remedy="use --attack gradient-matching") from error
    notes = tuple(search.obstacles(steps=recipe.train.steps, optimizer=recipe.train.optimizer))
    whole = recipe.boundary.tail is None and bool(seen.lengths)
    texts = search.sequences(longest=max(seen.lengths) if whole else recipe.train.max_tokens)
    return Texts(texts or [search.tokens() or search.tokens(BAG)], notes)


def match_gradients(knowledge: Knowledge, effort: Effort | None = None) -> Texts:
    """One text whose gradient is nearest to the update; and what stands in the way.

    Choices are tried one after another. With free text, the answer's labels are the tokens found so far. First the
    gradient alone decides; unless that is all but exact, the public model's opinion of the text is tried beside it.

    Raises:
        AttackError: the adversary sees no update, or knows no sequence's length.
    """
    seen, effort = _contribution(knowledge), effort or EFFORT
    if not seen.lengths:
        raise AttackError("no sequence is behind the update", remedy="attack a silo that trained")
    best: Match | None = None
    answers: list[list[int] | None] = [*knowledge.choices] or [None]
    for effort_now in (replace(effort, fluency=0.0), effort):
        for answer in answers:
            found = _matched(knowledge, seen, answer, effort_now)
            best = found if best is None or found.distance < best.distance else best
            if best.distance < EXACT:
                break
        else:
            continue
        break
    assert best is not None
    return Texts([best.ids], (*_obstacles(knowledge, seen), f"the best text's gradient is {best.distance:.2g} away"))


def _contribution(knowledge: Knowledge) -> Contribution:
    """The first update that holds something."""
    for one in knowledge.view.needs("contributions").contributions:
        if one.tensors:
            return one
    raise AttackError("the silo sent no update", remedy="attack a silo whose privacy budget bears one")


def _obstacles(knowledge: Knowledge, seen: Contribution) -> list[str]:
    train, update = knowledge.view.recipe.train, knowledge.view.recipe.boundary.update
    found = []
    if len(seen.lengths) > 1:
        found.append(f"{len(seen.lengths)} rows are behind the update: one text of the middle length is sought")
    if train.steps > 1:
        found.append(f"{train.steps} steps: the update is their sum, not one gradient")
    if train.optimizer != "sgd":
        found.append(
            f"{train.optimizer} scales every coordinate by itself: signs are compared, as after its first step"
        )
    if train.sharpness:
        found.append("the silo took its gradients uphill of the adapters that were shared")
    if knowledge.view.recipe.federation.control != "none":
        found.append("what the silo's control took out of its steps is in the update, too")
    if noising(update, 1).noise:
        found.append("noise is on the update")
    return found


def _matched(knowledge: Knowledge, seen: Contribution, answer: Sequence[int] | None, effort: Effort) -> Match:
    whole = Whole(knowledge).eval()
    own = whole.adapter()
    update = {name: -tensor for name, tensor in seen.tensors.items() if _learns(knowledge, name)}
    length = median_low(seen.lengths) + 1  # an answer's last token does not cross
    if answer is None:
        count = min(max(1, round(seen.weight / len(seen.lengths))), length - 1)
        known = {} if knowledge.ending is None else {length - 1: knowledge.ending}
    else:
        count = len(answer)
        known = {length - count + place: token for place, token in enumerate(answer)}

    def labelled(x_LD: torch.Tensor) -> torch.Tensor:
        labels_L = torch.full((length,), IGNORED)
        labels_L[length - count :] = torch.tensor(matcher.nearest(x_LD[length - count :]))
        for place, token in known.items():
            labels_L[place] = token
        return labels_L

    wanted = {name: own[name] for name in update}
    gradient_of = _by_labels(whole, wanted, labelled, signs=knowledge.view.recipe.train.optimizer != "sgd")
    unlikely = _unlikelihood(knowledge) if effort.fluency else None
    matcher = GradientMatcher(gradient_of, update, knowledge.embedding, unlikely=unlikely, effort=effort)
    return matcher.match(length, known)


def _learns(knowledge: Knowledge, name: str) -> bool:
    """Whether a tensor gets a gradient: without gradients from the trunk, what leads into it gets none."""
    return knowledge.view.recipe.boundary.gradients or not name.startswith("boundary_down")


def _by_labels(
    whole: Whole,
    adapter: Mapping[str, torch.nn.Parameter],
    labelled: Callable[[torch.Tensor], torch.Tensor],
    *,
    signs: bool,
) -> GradientOf:
    """The gradient with labels that follow from the text itself."""

    def gradient_of(x_LD: torch.Tensor) -> Tensors:
        return adapter_gradient(whole, adapter, labelled(x_LD), signs=signs)(x_LD)

    return gradient_of


def _unlikelihood(knowledge: Knowledge) -> Callable[[Sequence[int]], float]:
    @torch.no_grad()
    def unlikely(ids: Sequence[int]) -> float:
        ids_1L = torch.tensor([list(ids)])
        return float(knowledge.language_model(input_ids=ids_1L, labels=ids_1L).loss)

    return unlikely
