"""What silos do by themselves between two aggregations: how far their steps go, and what of it does not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.recipe.train import TrainSection

if TYPE_CHECKING:
    from isthmus.recipe.recipe import Recipe


def reach(train: TrainSection, steps: int) -> float:
    """How far so many local steps go, in steps of the learning rate: ‖a‖₁ of FedNova (Wang et al. 2020).

    Under the proximal pull of plain SGD a step counts for less the more come after it: (1 - (1 - ημ)^τ) / ημ. Momentum
    is a silo's own from round to round, so that every gradient has its whole effect in the end, whatever the round's
    length, and AdamW's steps are of one size: of both, steps are counted.
    """
    shrinks = train.learning_rate * train.proximal
    if not shrinks or train.optimizer != "sgd" or train.momentum:
        return float(steps)
    return sum((1 - shrinks) ** later for later in range(steps))


def mean_reach(recipe: Recipe) -> float:
    """τ of FedNova, by which the mean of normalized changes is multiplied: the mean over all silos of the recipe.

    The paper weighs it by the round's silos. It only sets the size of the step, and one that is known beforehand lets
    each silo multiply by it: nobody need be told how many steps a silo made.
    """
    return sum(reach(recipe.train, recipe.steps(silo.name)) for silo in recipe.silo) / len(recipe.silo)


def check_local(recipe: Recipe) -> None:
    """Raise ``ValueError``, reason and remedy, if no silo could do what the recipe asks for."""
    _check_steps(recipe)
    _check_sharpness(recipe)
    if recipe.federation.control == "scaffold":
        _check_control(recipe)


def _check_steps(recipe: Recipe) -> None:
    """Silos that do not step alike."""
    if _uneven(recipe) and recipe.trunk.adapter == "replica":
        raise ValueError(
            "silo.steps: replicas are averaged at the same steps of all silos; "
            "set trunk.adapter = 'shared', or give all silos as many steps"
        )
    if recipe.federation.normalized and recipe.federation.lora == "svd":
        raise ValueError(
            "federation.normalized: products of factors are averaged as they are, and no factor of a change is one of "
            "its product; set federation.lora = 'alternating', or normalized = false"
        )


def _check_sharpness(recipe: Recipe) -> None:
    """A first pass that would teach somebody something."""
    if not recipe.train.sharpness:
        return
    if recipe.boundary.defence is not None:
        raise ValueError(
            "train.sharpness: a defence learns at every pass, and a step has two; "
            "set sharpness = 0, or leave boundary.defence out"
        )
    if recipe.trunk.adapter == "replica" and recipe.lora.freeze_bottom and recipe.boundary.gradients:
        raise ValueError(
            "train.sharpness: with a frozen bottom the first pass crosses without a way back, and such a pass goes "
            "through the replicas' mean; set trunk.adapter = 'shared', or sharpness = 0"
        )


def _check_control(recipe: Recipe) -> None:
    """A control that would not be the mean of the silos' gradients, or not the same at both ends."""
    train, federation = recipe.train, recipe.federation
    impossible = {
        f"it is read off how far a silo went, and {train.optimizer!r} goes another way than the gradients; "
        "set train.optimizer = 'sgd'": train.optimizer != "sgd",
        "it is read off how far a silo went, and momentum goes on from earlier rounds; "
        "leave train.momentum out": train.momentum > 0,
        "it would take the proximal pull for a gradient; leave train.proximal out": train.proximal > 0,
        "the silos' controls cancel where all count alike; "
        "set federation.weights = 'equal' and leave fairness out": federation.weights.kind != "equal"
        or federation.fairness.kind != "none",
        "a rule that disbelieves a silo's change would have to disbelieve its control, which is the silo's own; "
        "set federation.rule = 'mean' and mix = false": federation.robust,
        "what compression leaves out would pass for a gradient of zero; "
        "leave federation.compression and bits out": federation.compression != "none" or federation.bits is not None,
        "with lora = 'svd' each round has new factors, of which the old ones' gradients say nothing; "
        "set federation.lora = 'alternating'": federation.lora == "svd",
        "silos must learn whether the root has their change, and an edge does not know; leave [[edge]] out": bool(
            recipe.edge
        ),
        "silos with other numbers of steps (their own, or rows that a budget leaves out) go unequally far; "
        "set federation.normalized = true": not federation.normalized and (_uneven(recipe) or _budgeted(recipe)),
    }
    for told in (told for told, is_so in impossible.items() if is_so):
        raise ValueError(f"federation.control: {told}, or control = 'none'")


def _uneven(recipe: Recipe) -> bool:
    return len({recipe.steps(silo.name) for silo in recipe.silo}) > 1


def _budgeted(recipe: Recipe) -> bool:
    """Whether a silo may have to leave rows out."""
    classes = recipe.sensitivity.classes.values() if recipe.sensitivity else ()
    budgets = (recipe.privacy.record_epsilon, recipe.privacy.silo_epsilon, *(one.epsilon for one in classes))
    return any(budget is not None for budget in budgets)
