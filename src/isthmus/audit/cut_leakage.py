"""What an attack recovers of a silo's text from what crosses at one cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from isthmus.attacks.catalogue import INVERSIONS
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.score import score
from isthmus.attacks.view.view import trunk_view
from isthmus.audit.capture import capture_pairs
from isthmus.audit.cut_probe import AttackRows
from isthmus.audit.judge import text_masks
from isthmus.audit.target import Target
from isthmus.engines.cuts import CutFigures
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe


def measured_leakage(
    figures: CutFigures, recipe: Recipe, name: str, own: AttackRows, attacks: Sequence[str]
) -> CutFigures:
    """The figures with the share of the attacked rows' tokens that the best of the attacks recovers.

    The attacker reads the hidden states that cross under the recipe's noise, knows the model, and other rows of the
    silo with what crossed of them. What all prompts begin or end with does not count.

    Args:
        name: the silo.
        attacks: names from ``attacks.catalogue.INVERSIONS``.
    """
    pairs = capture_pairs(Target(recipe), name, [*own.attacked, *own.known])
    count = len(own.attacked)
    crossings = tuple(replace(pair.crossing, kind="train") for pair in pairs[:count])
    folder = Checkpoint(recipe.model.path).folder
    knowledge = Knowledge(trunk_view(recipe, folder, crossings, pairs[count:], {}))
    truth, masks = [pair.tokens for pair in pairs[:count]], text_masks(own.attacked)
    found = {
        attack: score(truth, INVERSIONS[attack](knowledge), knowledge.tokenizer.decode, only=masks)["token_accuracy"]
        for attack in attacks
    }
    attack = max(found, key=lambda one: found[one].value)
    return replace(
        figures,
        leakage=found[attack].value,
        leakage_interval=(found[attack].low, found[attack].high),
        attack=attack,
        attacked_rows=count,
        known_rows=len(own.known),
    )
