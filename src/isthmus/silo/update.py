"""A silo's adapter updates on their way to the aggregator: its edge or the root. Open, masked, or noised as a sum.

An update is new minus old of the tensors that trained in a round. It leaves through the boundary, and the channel to
the aggregator takes it on.

Shapes: P parameters, K numbers that cross, S digits of a share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from isthmus.errors import IsthmusError, PeerGoneError, ProtocolError, QuorumError, RoundLostError
from isthmus.privacy.discrete import discrete_gaussian
from isthmus.privacy.distributed_gaussian import SumNoise, without_noise
from isthmus.privacy.events import ALL, Charge, Release
from isthmus.privacy.noise import Noise, SecretNoise
from isthmus.recipe import ClipSection, Recipe
from isthmus.recipe.sections.federation.clip import LONGEST, SHORTEST
from isthmus.silo.boundary import Boundary
from isthmus.silo.cohort import Cohort
from isthmus.silo.join import connect
from isthmus.updates.compression import Compression, Compressor
from isthmus.updates.flat import Layout
from isthmus.updates.masking import Advert, Member, Terms
from isthmus.updates.quantize import Whole, shortened
from isthmus.updates.sums import SumFormat
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel
from isthmus.wire.identity import Identity
from isthmus.wire.sum_keys import plan_digest, sign_keys, sign_survivors, signers, verify_keys

Tensors = Mapping[str, torch.Tensor]
log = logging.getLogger(__name__)


class Updates(Protocol):
    """One silo's updates to one aggregator. The order of calls in a round: ``offer``, ``begin``, ``pack``, ``send``."""

    received: Callable[[], Tensors] | None
    """The last packed change as the aggregator receives it; None: nothing of it left, or compression made it smaller.
    """

    def offer(self) -> pb.SumKeys | None:
        """The silo's keys for the next masked sum, signed; None where updates are open."""
        ...

    def begin(self, plan: pb.Plan, layout: Layout) -> None:
        """The round of this plan begins.

        Args:
            layout: of the tensors that train in it.

        Raises:
            IdentityError: another silo did not sign its keys in the plan.
            ProtocolError: the plan is not for this silo.
        """
        ...

    def affordable(self) -> bool:
        """Whether the privacy budget allows another update to leave."""
        ...

    def pack(self, plan: pb.Plan, change: Tensors, weight: float, share: float, quality: float = 0.0) -> pb.Update:
        """Release a change through the boundary, compressed if the recipe says so. Its compression error is kept.

        Args:
            change: new minus old, by uncut name.
            weight: its weight in the mean of open updates. 0: nothing of the change leaves.
            share: its weight in a masked sum, above 0 and at most 1.
            quality: of the trained model on held-out rows, 0 to 1, for the root's weights; not sent under masks.

        Raises:
            RoundLostError: the round went on without this silo.
        """
        ...

    def send(self, update: pb.Update) -> None:
        """Send what ``pack`` gave, and wait until the aggregator has taken it.

        Raises:
            RoundLostError: the round went on without this silo, or its sum failed.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The compression errors, as if what was packed last had arrived."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def update_sizes(recipe: Recipe, tensors: Tensors) -> tuple[int, int]:
    """Bytes of a silo's update to its aggregator, and of the mean that comes back.

    Args:
        tensors: those that train in the silo. Where a round trains some of them, it sends fewer.
    """
    compression, layout = Compression.of(recipe), Layout.of(tensors)
    whole = pb.Update(tensors=codec.encode_named(tensors)).ByteSize()
    if recipe.federation.secure.masks:
        sums = compression.sum_format(layout, 1, len(recipe.silo))
        words_W = sums.ring.pack(sums.encode(torch.zeros(layout.size), 1.0))
        return len(sums.ring.written(words_W)), whole
    compressor = compression.compressor(layout.size, 1)
    if compressor is None:
        return whole, whole
    # what top-k takes depends on the numbers: random ones leave the least to entropy coding
    return len(compressor.encode(torch.randn(layout.size, generator=torch.Generator().manual_seed(0)))), whole


class OpenUpdates:
    """Updates that the aggregator sees one by one, each with its weight."""

    def __init__(self, boundary: Boundary, channel: Channel, compression: Compression) -> None:
        self._boundary, self._channel, self._compression = boundary, channel, compression
        self._feedback = compression.feedback()
        self._layout = Layout({})
        self._compressor: Compressor | None = None
        self.received: Callable[[], Tensors] | None = None

    def offer(self) -> None:
        return None

    def begin(self, plan: pb.Plan, layout: Layout) -> None:
        self._layout, self._compressor = layout, self._compression.compressor(layout.size, plan.round)

    def affordable(self) -> bool:
        return self._boundary.update_affordable()

    def pack(self, plan: pb.Plan, change: Tensors, weight: float, share: float, quality: float = 0.0) -> pb.Update:
        self.received = None
        if not weight:
            return pb.Update(round=plan.round)
        update = self._boundary.release_update(self._layout.row(change), plan.round, self._written)
        update.round, update.weight, update.quality = plan.round, weight, quality
        return update

    def send(self, update: pb.Update) -> None:
        self._channel.call(update)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._feedback is None else self._feedback.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._feedback is not None:
            self._feedback.load_state_dict(state)

    def _written(self, row_P: torch.Tensor) -> pb.Update:
        if self._compressor is None:
            tensors = self._layout.tensors(row_P)
            self.received = lambda: tensors
            return pb.Update(tensors=codec.encode_named(tensors))
        if self._feedback is not None:
            row_P = self._feedback.added(self._layout.shapes, row_P)
        data = self._compressor.encode(row_P)
        if self._feedback is not None:
            self._feedback.keep(self._layout.shapes, row_P - self._compressor.decode(data))
        return pb.Update(compressed=data)


class MaskedUpdates:
    """Updates of which the aggregator sees the sum alone, by masks that cancel in it (see ``updates.masking``).

    Each round has fresh keys. The shares of other silos' secrets that this silo holds are forgotten with the round.
    """

    def __init__(
        self, boundary: Boundary, channel: Channel, identity: Identity, compression: Compression, cohort: Cohort
    ) -> None:
        self._boundary, self._channel, self._identity, self._compression = boundary, channel, identity, compression
        self._cohort = cohort
        self._feedback, self._exact = compression.feedback(), compression.exact
        self._member = Member(identity.name)
        self._keys: dict[str, pb.SumKeys] = {}
        self._format: SumFormat | None = None
        self._dealt: Answer | None = None
        self.received: Callable[[], Tensors] | None = None

    def offer(self) -> pb.SumKeys:
        self._identity = self._identity.renewed()  # and it stays the same for the whole round
        self._member = Member(self._identity.name)
        advert = self._member.advert
        return sign_keys(self._identity, sealing=advert.sealing, masking=advert.masking, commitment=advert.promise)

    def affordable(self) -> bool:
        return self._boundary.update_affordable()

    def begin(self, plan: pb.Plan, layout: Layout) -> None:
        """Send shares of this silo's secrets; the other silos' shares arrive while this one trains."""
        self._cohort.check(plan, self._identity.added)
        for name, keys in plan.keys.items():
            if name != self._identity.name:  # ``deal`` compares its own with what it offered
                verify_keys(self._identity, name, keys)
        adverts = {name: Advert(keys.sealing, keys.masking, keys.commitment) for name, keys in plan.keys.items()}
        self._keys = dict(plan.keys)
        sealed = self._member.deal(Terms(plan_digest(plan), adverts))
        self._format = self._compression.sum_format(layout, plan.round, len(plan.keys), plan.clip)
        deal = pb.Deal(round=plan.round, sealed=sealed, commitments=self._member.commitments)
        self._dealt = self._channel.submit(deal)

    def pack(self, plan: pb.Plan, change: Tensors, weight: float, share: float, quality: float = 0.0) -> pb.Update:
        assert self._dealt is not None
        assert self._format is not None
        self._accept(self._dealt.result())
        self.received = None
        if weight:
            update = self._released(plan.round, self._format, self._format.layout.row(change), share)
        else:  # nothing of the change leaves; but without this silo's zeros the others' sum might be lost
            update = self._masked(self._format, self._zeros(self._format))
        update.round, update.learned = plan.round, weight > 0
        return update

    def send(self, update: pb.Update) -> None:
        living = self._channel.call(update)
        if isinstance(living, pb.Survivors):
            self._reveal(update, living)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._feedback is None else self._feedback.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._feedback is not None:
            self._feedback.load_state_dict(state)

    def _accept(self, dealt: Any) -> None:
        self._member.accept(dict(dealt.sealed), dict(dealt.commitments))
        for problem in self._member.suspects.values():
            log.warning("%s; going on without them", problem)

    def _reveal(self, update: pb.Update, living: pb.Survivors) -> None:
        """Reveal shares once enough silos have signed that they received the same lists of survivors.

        Raises:
            ProtocolError: too few have, or too few of these have a change in the sum.
        """
        self._member.settle(living.alive, living.dropped)
        self._cohort.require(self._member.summed(living.alive), "survive")
        digest, quorum = self._member.terms.digest, self._member.terms.quorum
        signature = sign_survivors(self._identity, digest, living, learned=update.learned)
        agreed: Any = self._channel.call(pb.Agree(round=update.round, signature=signature))
        signed = signers(
            self._identity,
            self._keys,
            dict(agreed.signatures),
            digest,
            living,
            enough=quorum,
            changes=self._cohort.minimum,
        )
        if len(signed) < quorum:
            raise ProtocolError(
                f"{len(signed)} silos signed the same lists of survivors, {quorum} are needed: nothing is revealed",
                remedy="compare the lists in the other silos' logs; leave this aggregator if they differ",
            )
        # a signature proves a silo behind the numbers: keys alone may be ones of an earlier round, known by now
        self._cohort.require(sum(signed.values()), "signed that their change is in the sum")
        shares = self._member.reveal(living.alive, living.dropped)
        self._channel.call(pb.Reveal(round=update.round, shares=shares))

    def _released(self, round: int, sums: SumFormat, row_P: torch.Tensor, share: float) -> pb.Update:
        return self._boundary.release_update(
            row_P, round, lambda secured_P: self._written(sums, secured_P, share), summed=self._cohort.minimum
        )

    def _zeros(self, sums: SumFormat) -> Whole:
        """The numbers of a silo without a change."""
        return np.zeros(sums.size, np.int32)

    def _written(self, sums: SumFormat, row_P: torch.Tensor, share: float) -> pb.Update:
        """The row's numbers under masks. What the ring clips and rounds off is a compression error, too."""
        if self._feedback is not None:
            row_P = self._feedback.added(sums.layout.shapes, row_P)
        whole_KS = sums.encode(row_P, share)
        if self._feedback is not None:
            self._feedback.keep(sums.layout.shapes, row_P - sums.decode(whole_KS, share))
        elif self._exact:
            self.received = lambda: sums.layout.tensors(sums.decode(whole_KS, share))
        return self._masked(sums, whole_KS)

    def _masked(self, sums: SumFormat, whole_KS: Whole) -> pb.Update:
        words_W = sums.ring.pack(whole_KS)
        self._member.mask(words_W)
        return pb.Update(masked=sums.ring.written(words_W))


class NoisedUpdates(MaskedUpdates):
    """Masked updates that are clipped as whole numbers, with the silo's share of the sum's noise in each number.

    A silo that learned nothing adds its share all the same: it hides the others' updates, too.
    """

    def __init__(
        self,
        boundary: Boundary,
        channel: Channel,
        identity: Identity,
        compression: Compression,
        cohort: Cohort,
        *,
        noise: SumNoise,
        clip: ClipSection,
    ) -> None:
        super().__init__(boundary, channel, identity, compression, cohort)
        self._noise, self._clip = noise, clip

    def affordable(self) -> bool:
        return self._noise.central or self._boundary.update_affordable(Charge(ALL, concentrated=self._noise.loss))

    def begin(self, plan: pb.Plan, layout: Layout) -> None:
        """Send shares of this silo's secrets; the other silos' shares arrive while this one trains.

        Raises:
            ProtocolError: the plan's clip is out of range, or is not the recipe's constant one.
        """
        follows = self._clip.quantile is not None
        if not (SHORTEST <= plan.clip <= LONGEST if follows else plan.clip == self._clip.norm):
            raise ProtocolError(f"a plan with the clip {plan.clip}", remedy="give all parties one recipe")
        super().begin(plan, layout)

    def _released(self, round: int, sums: SumFormat, row_P: torch.Tensor, share: float) -> pb.Update:
        short_K, within = shortened(sums.project(row_P.nan_to_num(0.0, 0.0, 0.0)), sums.ring.range)
        bound = self._noise.update(sums.ring.levels, sums.count).bound

        def encode(draws: Noise) -> pb.Update:
            whole_K = sums.ring.encode_short(short_K, bound)
            indicator = sums.ring.side(within)[: sums.indicators]
            noised = self._noised(sums, np.concatenate([whole_K, indicator]), draws)
            return self._masked(sums, np.concatenate([noised, sums.ring.encode_share(share)]))

        return self._boundary.release_summed(self._events(round, sums), encode)

    def _zeros(self, sums: SumFormat) -> Whole:
        zeros = np.zeros(sums.count + sums.indicators, np.int32)
        return np.concatenate([self._noised(sums, zeros, SecretNoise()), sums.ring.encode_share(0.0)])

    def _noised(self, sums: SumFormat, whole: Whole, draws: Noise) -> Whole:
        """The update's numbers and its indicator, each with this silo's share of the noise."""
        if self._noise.central:
            return whole
        ring = sums.ring
        drawn = discrete_gaussian(draws, self._noise.update(ring.levels, sums.count).deviation, sums.count)
        if sums.indicators:
            drawn = np.append(drawn, discrete_gaussian(draws, self._noise.norm(ring.levels).deviation, 1))
        noised: Whole = whole + drawn.astype(np.int32)
        return noised

    def _events(self, round: int, sums: SumFormat) -> list[Release]:
        ring, count = sums.ring, sums.count
        events = [self._noise.update(ring.levels, count).event("update", round, count, ring.range, ring.step)]
        if sums.indicators:
            events.append(self._noise.norm(ring.levels).event("norm", round, 1, ring.range, 0.5 / ring.levels))
        events = [replace(event, summed=self._cohort.minimum) for event in events]
        return [without_noise(event) for event in events] if self._noise.central else events


class AggregatorClient:
    """A silo's connection to its aggregator: asks for plans, sends updates; goes to the edge's sibling if that is gone.

    Args:
        channel: a channel there, in place of the recipe's address.
        endless: wait for it until it is there, unless there is a sibling to turn to.

    Raises:
        IdentityError: updates are to be masked, and the silo's certificate is unusable.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        boundary: Boundary,
        channel: Channel | None = None,
        *,
        endless: bool = False,
    ) -> None:
        self._recipe, self._name, self._boundary, self._endless = recipe, name, boundary, endless
        self._aggregator = recipe.tree.parent(name)
        self._channel = channel or self._connect()
        self._updates = updates_of(recipe, name, boundary, self._channel, self._aggregator)

    def ask(self, completed: int, run: str = "") -> pb.Plan:
        """The next plan; the sibling's if the edge is gone or has too few silos left.

        Args:
            completed: rounds that this silo has finished.
            run: name of the run of the trunk that this silo is connected to; empty: not known.
        """
        try:
            plan: pb.Plan = self._channel.call(pb.Ready(completed=completed, keys=self._updates.offer(), run=run))
            return plan
        except (PeerGoneError, QuorumError) as error:
            self._move(error)
            return self.ask(completed, run)

    def begin(self, plan: pb.Plan, layout: Layout) -> None:
        """The round of this plan begins, for tensors of this layout (see ``Updates``)."""
        with self._round():
            self._updates.begin(plan, layout)

    def affordable(self) -> bool:
        """Whether the privacy budget allows another update to leave."""
        return self._updates.affordable()

    def pack(self, plan: pb.Plan, change: Tensors, weight: float, share: float, quality: float) -> pb.Update:
        """Release a change through the boundary (see ``Updates``)."""
        with self._round():
            return self._updates.pack(plan, change, weight, share, quality)

    def send(self, update: pb.Update) -> None:
        """Send what ``pack`` gave, and wait until the aggregator has taken it (see ``Updates``)."""
        with self._round():
            self._updates.send(update)

    def received(self) -> Tensors | None:
        """The last packed change as the aggregator receives it (see ``Updates``)."""
        return None if self._updates.received is None else self._updates.received()

    def state_dict(self) -> dict[str, Any]:
        return self._updates.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates.load_state_dict(state)

    def close(self) -> None:
        self._channel.close()

    def _connect(self) -> Channel:
        address = self._recipe.tree.node(self._aggregator).address
        endless = self._endless and self._sibling() is None
        return connect(self._recipe, self._name, "Root", address, server=self._aggregator, endless=endless)

    def _move(self, error: IsthmusError) -> None:
        """Belong to the cohort of the edge's sibling from now on.

        Raises:
            PeerGoneError, QuorumError: this very error, as there is no sibling, or it has failed, too.
        """
        if (sibling := self._sibling()) is None:
            raise error
        log.warning("%s: %s; going on with %s", self._aggregator, error.message, sibling)
        self._channel.close()
        self._aggregator, state = sibling, self._updates.state_dict()
        self._channel = self._connect()
        self._updates = updates_of(self._recipe, self._name, self._boundary, self._channel, self._aggregator)
        self._updates.load_state_dict(state)

    def _sibling(self) -> str | None:
        """The edge to turn to if this silo's own is gone; it is turned to once."""
        own = self._recipe.tree.parent(self._name)
        return self._recipe.tree.sibling(own) if self._aggregator == own else None

    @contextmanager
    def _round(self) -> Iterator[None]:
        """An edge that is gone loses the round, if there is another to turn to.

        Raises:
            RoundLostError: the edge is gone, and its sibling can be asked.
        """
        try:
            yield
        except PeerGoneError as gone:
            if self._sibling() is None:
                raise
            raise RoundLostError(gone.message, remedy="ask its sibling for the next plan") from gone


def updates_of(recipe: Recipe, name: str, boundary: Boundary, channel: Channel, aggregator: str) -> Updates:
    """The silo's updates to this aggregator as the recipe wants them: open, masked, or noised as a sum.

    Raises:
        IdentityError: they are to be masked, and the silo's certificate is unusable.
    """
    compression = Compression.of(recipe)
    if not recipe.federation.secure.masks:
        return OpenUpdates(boundary, channel, compression)
    identity = Identity.load(Path(recipe.wire.certificates), name, "silo")
    cohort = Cohort.of(recipe.tree.node(aggregator))
    if compression.noise is None:
        return MaskedUpdates(boundary, channel, identity, compression, cohort)
    return noised_updates(recipe, boundary, channel, identity, compression, cohort)


def noised_updates(
    recipe: Recipe,
    boundary: Boundary,
    channel: Channel,
    identity: Identity,
    compression: Compression,
    cohort: Cohort,
) -> NoisedUpdates:
    """Updates of a recipe whose masked sums have noise of their own."""
    assert compression.noise is not None
    assert recipe.federation.clip is not None
    noise, clip = compression.noise, recipe.federation.clip
    return NoisedUpdates(boundary, channel, identity, compression, cohort, noise=noise, clip=clip)
