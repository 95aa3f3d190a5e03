"""What cannot be asked of rounds that wait for nobody (``federation.buffer``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.recipe.recipe import Recipe


def check_buffer(recipe: Recipe) -> None:
    """Raise ``ValueError``, reason and remedy, if the recipe has a buffer and something that needs all silos at once.

    What is made of updates that were begun at different times must mean the same whatever round they are of.
    """
    buffer, federation, root = recipe.federation.buffer, recipe.federation, recipe.root
    if buffer is None:
        return
    if buffer > len(recipe.silo):
        raise ValueError(
            f"federation.buffer: {buffer} updates, but a version has one of each silo at most, and there are "
            f"{len(recipe.silo)} silos; lower it"
        )
    if root.minimum is not None and root.minimum > buffer:
        raise ValueError(
            f"root.minimum: a version is made of {buffer} updates and never has {root.minimum}; "
            "lower it, or raise federation.buffer"
        )
    for key, (asked, reason) in _refused(recipe).items():
        if asked:
            raise ValueError(f"federation.buffer: {reason}; leave out buffer, or {key}")
    if not federation.weights.claimed:
        raise ValueError(
            f"federation.weights: {federation.weights.kind!r} compares updates of one round, and a buffer's are of "
            "several; weigh by 'examples' or 'equal', or leave out federation.buffer"
        )


def _refused(recipe: Recipe) -> dict[str, tuple[bool, str]]:
    """By what the recipe would have to leave out: whether it is there, and why it does not go together."""
    federation = recipe.federation
    return {
        "federation.masks": (
            federation.masks,
            "masks cancel within one cohort that begins and ends together, and silos of a buffer do not",
        ),
        "[[edge]]": (
            bool(recipe.edge),
            "an edge passes on the sum of a round, and a buffer takes single updates, each with its own age",
        ),
        f"federation.lora = {federation.lora!r}": (
            federation.lora in ("alternating", "svd"),
            "which factors an update changes follows from its round, and updates of several rounds come together",
        ),
        f"federation.compression = {federation.compression!r}": (
            federation.compression in ("random-k", "sketch"),
            "numbers take turns by the round, and a slow silo, which has some rounds only, might never send its others",
        ),
        f"federation.rule = {federation.rule!r} and federation.mix": (
            federation.robust,
            "a rule bears a share of malicious silos among all, and of whoever comes first they may be the most",
        ),
        f"federation.control = {federation.control!r}": (
            federation.control != "none",
            "controls are the mean of all silos' as one round leaves them, and a version is made of some silos",
        ),
        "trunk.adapter = 'replica'": (
            recipe.trunk.adapter == "replica",
            "replicas are averaged when all silos are there, and they never are",
        ),
    }
