"""A silo's adapter update: what it learned in a round, new minus old."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from isthmus.silo.boundary import Boundary
from isthmus.wire import isthmus_pb2 as pb


def build_update(
    boundary: Boundary, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], *, round: int, weight: float
) -> pb.Update:
    """The update of this round, through the boundary.

    Args:
        old, new: the shared adapter tensors before and after the round's local work, by uncut name.
        weight: supervised tokens trained on. 0: the silo takes no part, and no tensor leaves.
    """
    if not weight:
        return pb.Update(round=round, weight=0.0)
    change = {name: new[name].detach() - old[name] for name in old}
    return pb.Update(round=round, weight=weight, tensors=boundary.release_update(change, round))
