"""The aggregator's side of a masked sum: adds what members send, then takes the masks off the total.

Shapes: W words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from isthmus.errors import ProtocolError
from isthmus.updates import shamir
from isthmus.updates.masking import Terms, add, pair_seeds
from isthmus.updates.quantize import Words


class Unmasking:
    """Adds masked numbers, then takes the masks off their sum.

    Args:
        dealt: the members whose shares were passed on, each with its commitments to them by holder; those alone may be
            in the sum.
        count: W.
    """

    def __init__(self, terms: Terms, dealt: Mapping[str, Mapping[str, bytes]], count: int) -> None:
        self._terms = terms
        self._dealt = dict(dealt)
        self._total_W: Words = np.zeros(count, np.uint64)
        self.alive: set[str] = set()
        self._shares: dict[str, dict[int, bytes]] = {name: {} for name in self._dealt}
        self._revealed: set[str] = set()
        self.liars: dict[str, set[str]] = {}
        """Members that revealed false shares, with whose secrets' these were; they are left out."""

    @property
    def dead(self) -> set[str]:
        return set(self._dealt) - self.alive

    def add(self, name: str, masked_W: Words) -> None:
        """A member's masked numbers.

        Raises:
            ProtocolError: it takes no part, or has sent its numbers before, or the sum is being unmasked already.
        """
        if name not in self._dealt or name in self.alive or self._revealed:
            raise ProtocolError(f"numbers of {name} are not expected", remedy="ask for the next plan")
        np.add(self._total_W, masked_W, out=self._total_W)
        self.alive.add(name)

    def reveal(self, name: str, shares: Mapping[str, bytes]) -> None:
        """Take the shares that a member whose numbers came has revealed.

        Raises:
            ProtocolError: its numbers did not come, it revealed shares before, or it does not hold them.
        """
        if name not in self.alive or name in self._revealed:
            raise ProtocolError(f"shares of {name} are not expected", remedy="ask for the next plan")
        if foreign := shares.keys() - (set(self._terms.holders(name)) & self._dealt.keys()):
            raise ProtocolError(f"{name} holds no share of {min(foreign)!r}", remedy="leave it out")
        self._revealed.add(name)
        for owner, share in shares.items():
            if hashlib.sha256(share).digest() == self._committed(owner, name):
                self._shares[owner][self._terms.point[name]] = share
            else:
                self.liars.setdefault(name, set()).add(owner)

    def total(self) -> Words:
        """The sum of the living members' numbers.

        Raises:
            ProtocolError: too few shares, or some that are none: nothing can be known of the sum then.
        """
        left = {self._seed_of(name): False for name in self.alive}
        for name in self.dead:
            if peers := self._masks_left(name):  # what the dead member would have added
                left |= pair_seeds(self._key_of(name), self._terms, name, peers)
        add(self._total_W, left)
        return self._total_W

    def frauds(self) -> set[str]:
        """Members that dealt shares of no secret, so that the sum is not known: what was revealed of theirs is what
        they committed themselves to and no secret, or more holders than may collude received nothing to reveal."""
        return {name for name in self._dealt if self._defrauds(name)}

    def _defrauds(self, name: str) -> bool:
        lied = {holder for holder, owners in self.liars.items() if name in owners}
        answered = self._revealed.intersection(self._terms.holders(name)) - lied
        if len(answered) - len(self._shares[name]) > self._terms.colluding:
            return True
        if len(self._shares[name]) < self._terms.threshold or (name in self.dead and not self._masks_left(name)):
            return False
        try:
            self._seed_of(name) if name in self.alive else self._key_of(name)
        except ProtocolError:
            return True
        return False

    def _committed(self, owner: str, holder: str) -> bytes:
        both = self._dealt[owner][holder]
        return both[: len(both) // 2] if owner in self.alive else both[len(both) // 2 :]

    def _masks_left(self, dead: str) -> Sequence[str]:
        """The living who added a mask for this member that nothing cancels."""
        return [name for name in self._terms.neighbours(dead) if name in self.alive]

    def _seed_of(self, name: str) -> bytes:
        seed = shamir.reconstruct(self._shares[name], self._terms.threshold)
        if hashlib.sha256(seed).digest() != self._terms.adverts[name].promise:
            raise ProtocolError(f"shares of {name}'s mask are not what it dealt", remedy="begin the round again")
        return seed

    def _key_of(self, name: str) -> X25519PrivateKey:
        key = X25519PrivateKey.from_private_bytes(shamir.reconstruct(self._shares[name], self._terms.threshold))
        if key.public_key().public_bytes_raw() != self._terms.adverts[name].masking:
            raise ProtocolError(f"shares of {name}'s key are not what it dealt", remedy="begin the round again")
        return key
