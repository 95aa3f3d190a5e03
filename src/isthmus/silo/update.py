"""A silo's adapter update: what it learned in a round, new minus old, sent open or under masks.

Shapes: P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from isthmus.errors import ProtocolError
from isthmus.federation.masking import Advert, Member, Terms
from isthmus.federation.quantize import Ring
from isthmus.model.flat import Layout
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.wire import codec, offer
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel
from isthmus.wire.identity import Identity

Tensors = Mapping[str, torch.Tensor]


class Updates(Protocol):
    """How a silo's updates get to the root, round by round."""

    def offer(self) -> pb.SumKeys | None:
        """What goes with the question for the next plan."""
        ...

    def begin(self, plan: pb.Plan) -> None:
        """The round of this plan begins.

        Raises:
            IdentityError: another silo did not sign the keys that are said to be its.
            ProtocolError: the plan is not for this silo.
        """
        ...

    def send(self, plan: pb.Plan, change: Tensors, weight: float, share: float, quality: float = 0.0) -> None:
        """What was learned, through the boundary.

        Args:
            change: new minus old, by uncut name.
            weight: what it counts for where updates are open. 0: nothing of the change leaves.
            share: the same under masks, at most 1.
            quality: what the root may be told of how well it does on held-out rows, 0 to 1; under masks it is not.

        Raises:
            RoundLostError: the round went on without this silo, or its sum failed.
        """
        ...


class OpenUpdates:
    """The root sees each update and what it says it weighs."""

    def __init__(self, boundary: Boundary, root: Channel) -> None:
        self._boundary, self._root = boundary, root

    def offer(self) -> None:
        return None

    def begin(self, plan: pb.Plan) -> None: ...

    def send(self, plan: pb.Plan, change: Tensors, weight: float, share: float, quality: float = 0.0) -> None:
        update = pb.Update()
        if weight:
            update = self._boundary.release_update(change, plan.round, open_update)
            update.quality = quality
        update.round, update.weight = plan.round, weight
        self._root.call(update)


class MaskedUpdates:
    """The root sees the sum of all updates. Each round has fresh keys; what this silo keeps of others' secrets it
    forgets with the round."""

    def __init__(self, boundary: Boundary, root: Channel, identity: Identity, range: float) -> None:
        self._boundary, self._root, self._identity, self._range = boundary, root, identity, range
        self._member = Member(identity.name)
        self._dealt: Answer | None = None

    def offer(self) -> pb.SumKeys:
        self._member = Member(self._identity.name)
        advert = self._member.advert
        return offer.signed(self._identity, sealing=advert.sealing, masking=advert.masking, promise=advert.promise)

    def begin(self, plan: pb.Plan) -> None:
        """The other silos' shares arrive while this one trains."""
        if not set(plan.keys) <= set(plan.participants):
            raise ProtocolError("a plan with keys of silos that have no part", remedy="give all parties one recipe")
        for name, keys in plan.keys.items():
            offer.verify(self._identity, name, keys)
        adverts = {name: Advert(keys.sealing, keys.masking, keys.promise) for name, keys in plan.keys.items()}
        sealed = self._member.deal(Terms(plan.sum, adverts))
        self._dealt = self._root.submit(pb.Deal(round=plan.round, sealed=sealed))

    def send(self, plan: pb.Plan, change: Tensors, weight: float, share: float, quality: float = 0.0) -> None:
        assert self._dealt is not None
        self._member.accept(dict(self._dealt.result().sealed))  # type: ignore[attr-defined]
        ring = Ring(len(plan.keys), self._range)
        if weight:
            update = self._boundary.release_update(
                change, plan.round, lambda secured: self._masked(secured, share, ring)
            )
        else:  # nothing of what was learned leaves; but without this silo's zeros the others' sum might be lost
            zeros = {name: torch.zeros_like(tensor) for name, tensor in change.items()}
            update = self._masked(zeros, 0.0, ring)
        update.round, update.weight = plan.round, float(bool(weight))
        living = self._root.call(update)
        if isinstance(living, pb.Living):
            shares = self._member.reveal(living.alive, living.dead)
            self._root.call(pb.Reveal(round=plan.round, shares=shares))

    def _masked(self, change: Tensors, share: float, ring: Ring) -> pb.Update:
        """The change times the share, and at last the share as a part of the range."""
        row_P = Layout({name: tuple(tensor.shape) for name, tensor in change.items()}).row(change).numpy()
        values_P = np.append(row_P * np.float32(share), np.float32(share * ring.range))
        return pb.Update(masked=ring.pack(self._member.mask(ring.encode(values_P))))


def updates(recipe: Recipe, name: str, boundary: Boundary, root: Channel) -> Updates:
    """As this recipe wants them sent.

    Raises:
        IdentityError: they are to be masked, and the silo's certificate is unusable.
    """
    if not recipe.federation.masks:
        return OpenUpdates(boundary, root)
    identity = Identity.load(Path(recipe.wire.certificates), name)
    return MaskedUpdates(boundary, root, identity, recipe.federation.range)


def open_update(change: Tensors) -> pb.Update:
    """In full, as fp32."""
    return pb.Update(tensors=codec.encode_named(change))
