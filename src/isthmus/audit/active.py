"""What adversaries do to a silo that do not follow the protocol: a root that gives adapters of its own.

The silo runs in this process with its own code, and refuses what it refuses in a run.
"""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.attacks.view.view import Crossing, Steering
from isthmus.audit.capture import ZeroTrunk, capture_rows, tapped_silo
from isthmus.audit.target import Target, Tensors
from isthmus.data.tokens import Tokens
from isthmus.model import adapters
from isthmus.silo.accepted import max_change
from isthmus.silo.served import SharedAdapters


def steering_of(target: Target, name: str, rows: Sequence[Tokens]) -> Steering:
    """What a root that lies can do to a silo, and to these rows of it: give adapters as those of the recipe's last
    round, or of one more if that has finished. All rounds until then together bound how far they may be."""
    with tapped_silo(target, name, ZeroTrunk(target.recipe)) as (silo, _):
        published = {key: one.detach().clone() for part in silo.parts for key, one in adapters.trainable(part).items()}
    bound = max_change(target.recipe, sum(one.numel() for one in published.values()))
    last = max(target.completed + 1, target.recipe.train.rounds)

    def give(tensors: Tensors) -> tuple[Crossing, ...]:
        return capture_rows(target, name, rows, SharedAdapters(last, "", tensors)).crossings

    return Steering(published, None if bound is None else (last - target.completed) * bound, give)
