"""A silo's adapter update where the sum of all has noise of its own.

Shapes: K numbers that cross.
"""

from __future__ import annotations

import numpy as np

from isthmus.errors import ProtocolError
from isthmus.privacy.discrete import discrete_gaussian
from isthmus.privacy.distributed_gaussian import without_noise
from isthmus.privacy.events import ALL, Charge, Release
from isthmus.privacy.noise import Noise, SecretNoise
from isthmus.recipe import Recipe
from isthmus.recipe.sections.federation.clip import LONGEST, SHORTEST
from isthmus.silo.boundary import Boundary
from isthmus.silo.update import MaskedUpdates, Tensors
from isthmus.updates.compression import Compression
from isthmus.updates.flat import Layout
from isthmus.updates.projections import Projection
from isthmus.updates.quantize import Ring, Whole, shortened
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Channel
from isthmus.wire.identity import Identity


class NoisedUpdates(MaskedUpdates):
    """Masked updates that are clipped as whole numbers, to each of which the silo adds its share of the sum's noise.

    A silo that learned nothing adds its share all the same: the others' updates are hidden by it, too.
    """

    def __init__(
        self, boundary: Boundary, root: Channel, identity: Identity, compression: Compression, recipe: Recipe
    ) -> None:
        super().__init__(boundary, root, identity, compression)
        assert compression.noise is not None
        assert recipe.federation.clip is not None
        self._noise, self._clip, self._fewest = compression.noise, recipe.federation.clip, recipe.tree.smallest()

    def affordable(self) -> bool:
        return self._noise.central or self._boundary.update_affordable(Charge(ALL, concentrated=self._noise.loss))

    def begin(self, plan: pb.Plan) -> None:
        """The other silos' shares arrive while this one trains.

        Raises:
            ProtocolError: the plan's clip is none, or another than the recipe's that stays.
        """
        follows = self._clip.quantile is not None
        if not (SHORTEST <= plan.clip <= LONGEST if follows else plan.clip == self._clip.norm):
            raise ProtocolError(f"a plan with the clip {plan.clip}", remedy="give all parties one recipe")
        super().begin(plan)

    def send(self, update: pb.Update) -> None:
        living = self._root.call(update)
        if isinstance(living, pb.Living):
            if (count := self._member.summed(living.alive)) < self._fewest:
                raise ProtocolError(
                    f"a sum of {count} silos has less noise than that of the {self._fewest} that it needs",
                    remedy="leave this aggregator: it should have begun the round again",
                )
            self._reveal(update, living)

    def _released(self, round: int, change: Tensors, share: float, ring: Ring, projection: Projection) -> pb.Update:
        short_K, within = shortened(
            projection.project(Layout.of(change).row(change).nan_to_num(0.0, 0.0, 0.0)), ring.range
        )
        bound = self._noise.update(ring.levels, len(short_K)).bound

        def encode(draws: Noise) -> pb.Update:
            whole_K = ring.encode_short(short_K, bound)
            told = ring.side(within)[: self._compression.tells]
            noised = self._noised(np.concatenate([whole_K, told]), ring, draws)
            return self._masked(np.concatenate([noised, ring.encode_share(share)]), ring)

        return self._boundary.release_summed(self._events(round, ring, len(short_K)), encode)

    def _nothing(self, ring: Ring, projection: Projection) -> Whole:
        zeros = np.zeros(projection.size + self._compression.tells, np.int32)
        return np.concatenate([self._noised(zeros, ring, SecretNoise()), ring.encode_share(0.0)])

    def _noised(self, whole: Whole, ring: Ring, draws: Noise) -> Whole:
        """The update's numbers, and whether it was within the clip, with this silo's share of each one's noise."""
        if self._noise.central:
            return whole
        count = len(whole) - self._compression.tells
        drawn = discrete_gaussian(draws, self._noise.update(ring.levels, count).deviation, count)
        if self._compression.tells:
            drawn = np.append(drawn, discrete_gaussian(draws, self._noise.norm(ring.levels).deviation, 1))
        noised: Whole = whole + drawn.astype(np.int32)
        return noised

    def _events(self, round: int, ring: Ring, count: int) -> list[Release]:
        events = [self._noise.update(ring.levels, count).event("update", round, count, ring.range, ring.step)]
        if self._compression.tells:
            events.append(self._noise.norm(ring.levels).event("norm", round, 1, ring.range, 0.5 / ring.levels))
        return [without_noise(event) for event in events] if self._noise.central else events
