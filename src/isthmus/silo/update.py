"""A silo's adapter update: what it learned in a round, new minus old, sent open or under masks.

Shapes: P parameters, K numbers that cross.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from isthmus.errors import ProtocolError
from isthmus.silo.boundary import Boundary
from isthmus.updates.compression import Compression, ErrorFeedback
from isthmus.updates.flat import Layout
from isthmus.updates.masking import Advert, Member, Terms
from isthmus.updates.projections import Projection
from isthmus.updates.quantize import Ring, Whole
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel
from isthmus.wire.identity import Identity
from isthmus.wire.sum_keys import sign_keys, verify_keys

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

    def affordable(self) -> bool:
        """Whether the privacy budget bears that an update leaves."""
        ...

    def pack(self, plan: pb.Plan, change: Tensors, weight: float, share: float, quality: float = 0.0) -> pb.Update:
        """What was learned, through the boundary; compressed, if it is to be. What that leaves out is kept for later.

        Args:
            change: new minus old, by uncut name.
            weight: what it counts for where updates are open. 0: nothing of the change leaves.
            share: the same under masks, at most 1.
            quality: what the root may be told of how well it does on held-out rows, 0 to 1; under masks it is not.

        Raises:
            RoundLostError: the round went on without this silo.
        """
        ...

    def send(self, update: pb.Update) -> None:
        """What was packed.

        Raises:
            RoundLostError: the round went on without this silo, or its sum failed.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is kept for later, as if what was packed had arrived."""
        ...

    @property
    def crossed(self) -> Tensors | None:
        """What was packed last, as whoever reads it gets it; None: nothing. Of an update that compression made smaller
        it is not told."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class OpenUpdates:
    """The root sees each update and what it says it weighs."""

    def __init__(self, boundary: Boundary, root: Channel, compression: Compression) -> None:
        self._boundary, self._root, self._compression = boundary, root, compression
        self._feedback = ErrorFeedback(compression.feedback)
        self.crossed: Tensors | None = None

    def offer(self) -> None:
        return None

    def begin(self, plan: pb.Plan) -> None: ...

    def affordable(self) -> bool:
        return self._boundary.update_affordable()

    def pack(self, plan: pb.Plan, change: Tensors, weight: float, share: float, quality: float = 0.0) -> pb.Update:
        update, self.crossed = pb.Update(), None
        if weight:
            update = self._boundary.release_update(
                change, plan.round, lambda layout, row_P: self._written(layout, row_P, plan.round)
            )
            update.quality = quality
        update.round, update.weight = plan.round, weight
        return update

    def send(self, update: pb.Update) -> None:
        self._root.call(update)

    def state_dict(self) -> dict[str, Any]:
        return self._feedback.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._feedback.load_state_dict(state)

    def _written(self, layout: Layout, row_P: torch.Tensor, round: int) -> pb.Update:
        due_P = self._feedback.added(layout.shapes, row_P)
        compressor = self._compression.compressor(len(due_P), round)
        if compressor is None:
            self.crossed = layout.tensors(row_P)
            return open_update(layout, row_P)
        data = compressor.encode(due_P)
        if self._feedback.kept:
            self._feedback.leave(layout.shapes, due_P - compressor.decode(data))
        return pb.Update(compressed=data)


class MaskedUpdates:
    """The root sees the sum of all updates. Each round has fresh keys; what this silo keeps of others' secrets it
    forgets with the round."""

    def __init__(self, boundary: Boundary, root: Channel, identity: Identity, compression: Compression) -> None:
        self._boundary, self._root, self._identity, self._compression = boundary, root, identity, compression
        self._feedback = ErrorFeedback(compression.feedback)
        self._member = Member(identity.name)
        self._dealt: Answer | None = None
        self._crossed: Callable[[], Tensors] | None = None

    def offer(self) -> pb.SumKeys:
        self._member = Member(self._identity.name)
        advert = self._member.advert
        return sign_keys(self._identity, sealing=advert.sealing, masking=advert.masking, commitment=advert.promise)

    def affordable(self) -> bool:
        return self._boundary.update_affordable()

    def begin(self, plan: pb.Plan) -> None:
        """The other silos' shares arrive while this one trains."""
        if not set(plan.keys) <= set(plan.participants):
            raise ProtocolError("a plan with keys of silos that have no part", remedy="give all parties one recipe")
        for name, keys in plan.keys.items():
            if name != self._identity.name:  # to its own this silo deals only if they are what it offered
                verify_keys(self._identity, name, keys)
        adverts = {name: Advert(keys.sealing, keys.masking, keys.commitment) for name, keys in plan.keys.items()}
        sealed = self._member.deal(Terms(plan.sum, adverts))
        self._dealt = self._root.submit(pb.Deal(round=plan.round, sealed=sealed))

    def pack(self, plan: pb.Plan, change: Tensors, weight: float, share: float, quality: float = 0.0) -> pb.Update:
        assert self._dealt is not None
        self._member.accept(dict(self._dealt.result().sealed))  # type: ignore[attr-defined]
        projection = self._compression.projection(Layout.of(change).size, plan.round)
        self._crossed = None
        ring = self._compression.ring(len(plan.keys), projection.size, plan.clip)
        if weight:
            update = self._released(plan.round, change, share, ring, projection)
        else:  # nothing of what was learned leaves; but without this silo's zeros the others' sum might be lost
            update = self._masked(self._nothing(ring, projection), ring)
        update.round, update.weight = plan.round, float(bool(weight))
        return update

    @property
    def crossed(self) -> Tensors | None:
        return self._crossed() if self._crossed else None

    def send(self, update: pb.Update) -> None:
        living = self._root.call(update)
        if isinstance(living, pb.Survivors):
            self._reveal(update, living)

    def _reveal(self, update: pb.Update, living: pb.Survivors) -> None:
        shares = self._member.reveal(living.alive, living.dropped)
        self._root.call(pb.Reveal(round=update.round, shares=shares))

    def state_dict(self) -> dict[str, Any]:
        return self._feedback.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._feedback.load_state_dict(state)

    def _released(self, round: int, change: Tensors, share: float, ring: Ring, projection: Projection) -> pb.Update:
        return self._boundary.release_update(
            change, round, lambda layout, row_P: self._weighed(layout, row_P, share, ring, projection)
        )

    def _nothing(self, ring: Ring, projection: Projection) -> Whole:
        """What a silo sends that learned nothing."""
        return np.zeros(projection.size + ring.digits, np.int32)

    def _weighed(
        self, layout: Layout, row_P: torch.Tensor, share: float, ring: Ring, projection: Projection
    ) -> pb.Update:
        """The numbers that cross of the change, times the share. What the ring clips and rounds off waits, too."""
        due_P = self._feedback.added(layout.shapes, row_P)
        whole_KS = np.empty(projection.size + ring.digits, np.int32)
        whole_K = ring.encode(projection.project(due_P).numpy(), times=share, out=whole_KS[: projection.size])
        whole_KS[projection.size :] = ring.encode_share(share)

        def crossed() -> torch.Tensor:
            return projection.lift(torch.from_numpy(ring.decode(whole_K) / share).float())

        if self._feedback.kept:
            self._feedback.leave(layout.shapes, due_P - crossed())
        if self._compression.exact:
            self._crossed = lambda: layout.tensors(crossed())
        return self._masked(whole_KS, ring)

    def _masked(self, whole_KS: Whole, ring: Ring) -> pb.Update:
        words = ring.pack(whole_KS)
        self._member.mask(words)
        return pb.Update(masked=ring.written(words))


def open_update(layout: Layout, row_P: torch.Tensor) -> pb.Update:
    """In full, as fp32."""
    return pb.Update(tensors=codec.encode_named(layout.tensors(row_P)))
