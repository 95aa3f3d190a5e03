"""Rounds of one step whose updates are gradients: what a recipe must not have beside them."""

from __future__ import annotations

from collections.abc import Iterator

from isthmus.recipe.sections import FederationSection, SiloSection, TrainSection


def obstacles(train: TrainSection, silos: tuple[SiloSection, ...], federation: FederationSection) -> Iterator[str]:
    """Why a round's updates cannot be gradients, each with its remedy; nothing: they can."""
    present = {
        "a round of several steps has no one gradient; set train.steps = 1, and leave train.epochs and "
        "silo.steps out": train.epochs is not None or any((silo.steps or train.steps) > 1 for silo in silos),
        "a late gradient is of adapters that are gone; leave federation.asynchronous.buffer out": (
            federation.asynchronous.buffer is not None
        ),
        "the root steps by train.optimizer; leave federation.optimizer out": federation.optimizer.kind != "none",
        "with lora = 'svd' each round has new factors, whose moments would be of others; "
        "set federation.lora = 'frozen-a'": federation.lora == "svd",
        "the trunk's part of a block between the cuts is a change; set federation.between = 'rest'": (
            federation.between == "train"
        ),
        "a silo that takes no step of its own goes not astray; set federation.control = 'none'": (
            federation.control != "none"
        ),
        "all silos take the root's one step; set federation.normalized = false": federation.normalized,
        "in a round of one step no silo is away from its start; leave train.proximal out": train.proximal > 0,
        "a silo has no model of its own step to measure; leave federation.weights.kind = 'quality' out": (
            federation.weights.kind == "quality"
        ),
    }
    return (reason for reason, there in present.items() if there)


def check_gradients(train: TrainSection, silos: tuple[SiloSection, ...], federation: FederationSection) -> None:
    """Refuse gradients as updates where a round has none, or the root no step of its own."""
    if federation.updates != "gradients":
        return
    for reason in obstacles(train, silos, federation):
        raise ValueError(f"federation.updates: {reason}, or updates = 'changes'")
