"""Masks under which an aggregator sees the sum of its members' numbers and nothing else, whoever drops out.

After Bonawitz et al. (CCS 2017), with the sparse graph of Bell et al. (CCS 2020). Every member adds a mask of its own
and, for each neighbour, one that the two agree on, with opposite signs. Masks of pairs cancel in the sum. Each member's
two secrets (the seed of its own mask, its key for the pairs) are shared among its neighbours and itself. In the end
they reveal shares of the seed of each member whose numbers came, and shares of the key of each whose numbers did not;
never both of one member, since with both its numbers could be read.

The aggregator relays, so all messages between members are signed or sealed. This is pure mathematics: no network, no
clock. ``Member`` is the silo's side; ``unmasking.Unmasking`` the aggregator's.

Shapes: W words of numbers.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from isthmus.errors import ProtocolError
from isthmus.updates import shamir
from isthmus.updates.graph import quorum, sparse_graph
from isthmus.updates.quantize import Words

FEWEST = 3
"""Members of a sum: of two, each would learn the other's numbers."""
COMPLETE = 128
"""Members up to which all are each other's neighbours."""
KEY = 32
_LEAVE = "leave this aggregator"
STREAM_PIECE = 2**14
"""Words of all streams that are added before the next ones."""


@dataclass(frozen=True)
class Advert:
    """A member's advertised keys for one sum: fresh public keys, and a digest of the seed of its own mask."""

    sealing: bytes
    """X25519, for the shares that others send it."""
    masking: bytes
    """X25519, for the masks of pairs."""
    promise: bytes
    """SHA-256 of the seed: a reconstructed seed is checked against it."""


@dataclass(frozen=True)
class Terms:
    """The terms of one sum, the same for all parties to it.

    Args:
        context: names the sum, never to be used for another; keys and seals are bound to it.
        adverts: of all members, by name.
    """

    context: bytes
    adverts: Mapping[str, Advert]
    degree: int | None = None
    """Neighbours of a member; None: all others, or of very many as few as is safe (see ``sparse_graph``)."""

    def __post_init__(self) -> None:
        if len(self.adverts) < FEWEST:
            raise ProtocolError(
                f"a masked sum of {len(self.adverts)} silos would reveal what each one sent",
                remedy=f"let {FEWEST} or more silos take part, or leave the masks out of the recipe",
            )

    @cached_property
    def digest(self) -> bytes:
        """Of all terms: parties with the same digest were told the same."""
        found = hashlib.sha256(hashlib.sha256(self.context).digest())
        for name, advert in sorted(self.adverts.items()):
            found.update(hashlib.sha256(name.encode()).digest())
            for part in (advert.sealing, advert.masking, advert.promise):
                found.update(hashlib.sha256(part).digest())
        return found.digest()

    @cached_property
    def quorum(self) -> int:
        """Members who must live, and agree who else does, before anyone reveals a share."""
        return quorum(len(self.adverts))

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Members around a circle, in an order that nobody chose."""
        return tuple(sorted(self.adverts, key=lambda name: hashlib.sha256(self.context + name.encode()).digest()))

    @cached_property
    def point(self) -> dict[str, int]:
        """By member, the point of its shares, from 1."""
        return {name: number for number, name in enumerate(self.order, 1)}

    def neighbours(self, name: str) -> list[str]:
        """Those on both sides of a member around the circle; neighbours of each other, therefore."""
        count = len(self.order)
        wanted = self.degree or (count if count <= COMPLETE else sparse_graph(count).degree)
        if wanted >= count - 1:
            return [other for other in self.order if other != name]
        place = self.order.index(name)
        return [
            self.order[(place + step) % count]
            for side in (1, -1)
            for step in range(side, side * (wanted // 2 + 1), side)
        ]

    @cached_property
    def threshold(self) -> int:
        """Holders who must reveal their share of a secret: more than two thirds, so that less than a third of them,
        lying to the others, never get a member's seed and its key; in large sums as many as ``sparse_graph`` says."""
        if self.degree is None and len(self.order) > COMPLETE:
            return sparse_graph(len(self.order)).threshold
        return quorum(len(self.neighbours(self.order[0])) + 1)

    @property
    def colluding(self) -> int:
        """The most of a member's holders that may be on the aggregator's side: fewer than a third of all members are,
        and of a few neighbours always too few to reveal alone."""
        complete = len(self.neighbours(self.order[0])) + 1 == len(self.order)
        return (len(self.order) - 1) // 3 if complete else self.threshold - 1

    def holders(self, name: str) -> list[str]:
        """The holders of shares of a member's secrets: its neighbours and itself."""
        return [name, *self.neighbours(name)]


@dataclass(frozen=True)
class Pair:
    """The shares of one member's two secrets that another one holds."""

    seed: bytes
    key: bytes


@dataclass
class Member:
    """One silo's side of one sum. The order of calls: ``advert``, ``deal``, ``accept``, ``mask``, ``settle``,
    ``reveal``."""

    name: str
    terms: Terms = field(init=False)
    commitments: dict[str, bytes] = field(default_factory=dict)
    """By holder, the digests of the shares that this member dealt to it."""
    suspects: dict[str, str] = field(default_factory=dict)
    """Dealers whose shares are none, with what is wrong; this member has nothing to reveal of them."""
    _sealing: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    _masking: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    _seed: bytes = field(default_factory=lambda: secrets.token_bytes(KEY))
    _sealing_keys: dict[str, bytes] = field(default_factory=dict)
    _held: dict[str, Pair] = field(default_factory=dict)
    _peers: list[str] = field(default_factory=list)
    _settled: tuple[frozenset[str], frozenset[str]] | None = None
    _revealed: bool = False

    @property
    def advert(self) -> Advert:
        return Advert(
            self._sealing.public_key().public_bytes_raw(),
            self._masking.public_key().public_bytes_raw(),
            hashlib.sha256(self._seed).digest(),
        )

    def deal(self, terms: Terms) -> dict[str, bytes]:
        """Shares of this member's secrets, sealed for each neighbour.

        Raises:
            ProtocolError: the terms are not those that this member offered its keys for.
        """
        if terms.adverts.get(self.name) != self.advert:
            raise ProtocolError(f"a sum without the keys of {self.name}", remedy="ask for the next plan")
        self.terms = terms
        points = {holder: terms.point[holder] for holder in terms.holders(self.name)}
        seeds, keys = (
            shamir.split(secret, points.values(), terms.threshold)
            for secret in (self._seed, self._masking.private_bytes_raw())
        )
        pairs = {holder: Pair(seeds[point], keys[point]) for holder, point in points.items()}
        self.commitments = {holder: commitment(pair) for holder, pair in pairs.items()}
        self._held[self.name] = pairs.pop(self.name)
        return {holder: self._seal(holder, pair) for holder, pair in pairs.items()}

    def accept(self, sealed: Mapping[str, bytes], commitments: Mapping[str, bytes]) -> None:
        """Accept the shares that neighbours sealed for this member. Neighbours that sent none take no part in the sum.

        Shares that were altered, sealed for another or are not what their dealer committed itself to are not accepted,
        and their dealers are ``suspects``. They stay in the sum all the same: the other holders' shares are enough.

        Args:
            commitments: the dealers' to these shares.

        Raises:
            ProtocolError: one is not a neighbour's; or they are too few.
        """
        neighbours = self.terms.neighbours(self.name)
        if foreign := sealed.keys() - set(neighbours):
            raise ProtocolError(f"shares of {min(foreign)!r}, no neighbour", remedy="leave that silo out")
        self._require(len(sealed) + 1, "dealt shares")
        for name, data in sealed.items():
            try:
                pair = self._open(name, data)
                if commitment(pair) != commitments.get(name):
                    raise ProtocolError(f"the shares of {name} are not those it committed to", remedy="leave it out")
                self._held[name] = pair
            except ProtocolError as error:
                self.suspects[name] = error.message
        self._peers = [name for name in neighbours if name in sealed]

    def mask(self, words_W: Words) -> None:
        """Add all of this member's masks to these words."""
        add(words_W, {self._seed: True} | pair_seeds(self._masking, self.terms, self.name, self._peers))

    def settle(self, alive: Iterable[str], dead: Iterable[str]) -> None:
        """Take these for the members whose numbers came and whose did not, once and for all.

        Raises:
            ProtocolError: somebody is on both lists or on neither, this member is dead, too few live, or other lists
                were settled on before.
        """
        alive, dead = frozenset(alive), frozenset(dead)
        if both := alive & dead:
            raise ProtocolError(f"{min(both)} is said to live and to be dead", remedy=_LEAVE)
        if missing := {self.name, *self._peers} - alive - dead:
            raise ProtocolError(f"it is not said whether {min(missing)} lives", remedy=_LEAVE)
        if self.name not in alive:
            raise ProtocolError(f"{self.name} is said to be dead", remedy="ask for the next plan")
        if hidden := alive & set(self.terms.neighbours(self.name)) - set(self._peers):
            raise ProtocolError(f"{min(hidden)} is said to live, but its shares never came", remedy=_LEAVE)
        self._require(len(alive & {self.name, *self._peers}), "living neighbours")
        if (count := len(alive & self.terms.adverts.keys())) < self.terms.quorum:
            raise ProtocolError(
                f"{count} living silos where {self.terms.quorum} are needed", remedy="wait for more silos to take part"
            )
        if self._settled not in (None, (alive, dead)):
            raise ProtocolError("other silos are said to live than before", remedy=_LEAVE)
        self._settled = alive, dead

    def reveal(self, alive: Iterable[str], dead: Iterable[str]) -> dict[str, bytes]:
        """Shares, by the name of the member whose secret they are of: of a living one's seed, of a dead one's key.

        To be called only when a ``Terms.quorum`` of members is known to have settled on the same.

        Args:
            alive, dead: members whose numbers came, and whose did not.

        Raises:
            ProtocolError: see ``settle``; or it was asked before.
        """
        alive, dead = frozenset(alive), frozenset(dead)
        if self._revealed:
            raise ProtocolError("shares are given out once a sum", remedy="ask for the next plan")
        self.settle(alive, dead)
        self._revealed = True
        return {name: pair.seed if name in alive else pair.key for name, pair in self._held.items()}

    def summed(self, alive: Iterable[str]) -> int:
        """Members whose numbers are in the sum if these are alive. A member knows which of its neighbours sent shares,
        and their masks cancel in no sum without their numbers; about other members it believes the aggregator."""
        unknown = self.terms.adverts.keys() - set(self.terms.neighbours(self.name))
        return len(set(alive) & ({self.name, *self._peers} | unknown))

    def _require(self, count: int, what: str) -> None:
        if count < self.terms.threshold:
            raise ProtocolError(
                f"{count} {what} where {self.terms.threshold} are needed", remedy="wait for more silos to take part"
            )

    def _seal(self, holder: str, pair: Pair) -> bytes:
        cipher = ChaCha20Poly1305(self._sealing_key(holder))
        return cipher.encrypt(way(self.name, holder), pair.seed + pair.key, self.terms.context)

    def _open(self, dealer: str, data: bytes) -> Pair:
        cipher = ChaCha20Poly1305(self._sealing_key(dealer))
        try:
            plain = cipher.decrypt(way(dealer, self.name), data, self.terms.context)
        except InvalidTag as error:
            raise ProtocolError(f"the shares of {dealer} were altered on their way", remedy="leave it out") from error
        if len(plain) != 2 * shamir.SHARE:
            raise ProtocolError(f"{dealer} sealed no shares", remedy="leave it out")
        return Pair(plain[: shamir.SHARE], plain[shamir.SHARE :])

    def _sealing_key(self, other: str) -> bytes:
        if other not in self._sealing_keys:
            public = self.terms.adverts[other].sealing
            self._sealing_keys[other] = agree(self._sealing, public, self.terms.context, "seal", self.name, other)
        return self._sealing_keys[other]


def commitment(pair: Pair) -> bytes:
    """What a dealer commits itself to: the digests of the two shares, which are too random to be guessed from them."""
    return hashlib.sha256(pair.seed).digest() + hashlib.sha256(pair.key).digest()


def pair_seeds(key: X25519PrivateKey, terms: Terms, name: str, peers: Iterable[str]) -> dict[bytes, bool]:
    """The seeds that a member with this key agrees on with its peers, each with the sign that the member gives it."""
    return {agree(key, terms.adverts[peer].masking, terms.context, "mask", name, peer): name < peer for peer in peers}


def way(sender: str, receiver: str) -> bytes:
    """The nonce for the one message that goes this way under a pair's key."""
    return bytes(11) + bytes([sender < receiver])


def agree(key: X25519PrivateKey, public: bytes, context: bytes, purpose: str, name: str, peer: str) -> bytes:
    """A key that only the holders of these two keys can make, for one purpose in one sum.

    Raises:
        ProtocolError: the public key is none.
    """
    try:
        shared = key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtocolError("a public key with which nothing can be agreed", remedy="leave out its silo") from error
    info = "\0".join((purpose, *sorted((name, peer)))).encode()
    return HKDF(hashes.SHA256(), KEY, salt=context, info=info).derive(shared)


def check_usable(public: bytes) -> None:
    """Raise ``ProtocolError`` if nothing can be agreed with this public key: with it no other member could go on."""
    agree(X25519PrivateKey.generate(), public, b"", "check", "", "")


def stream(seed: bytes, count: int) -> Words:
    """So many pseudorandom words: AES-256 in counter mode, as GCM counts.

    GCM's tag is never asked for. OpenSSL encrypts GCM's blocks by wide vectors, plain CTR's one after another: that
    makes up for the tag and a fifth of the time besides.
    """
    words_W = np.zeros(count, np.uint64)
    add(words_W, {seed: True})
    return words_W


def add(total_W: Words, seeds: Mapping[bytes, bool]) -> None:
    """Add the seeds' streams to these words, or take those away whose sign is False.

    Piece by piece, all streams' before the next one, so that a piece stays in the processor's cache.
    """
    ciphers = [(Cipher(algorithms.AES(seed), modes.GCM(bytes(12))).encryptor(), sign) for seed, sign in seeds.items()]
    zeros, buffer = (
        bytes(8 * STREAM_PIECE),
        bytearray(8 * STREAM_PIECE + 15),
    )  # the cipher wants room for one block more
    drawn_W = np.frombuffer(buffer, "<u8", STREAM_PIECE)
    for start in range(0, len(total_W), STREAM_PIECE):
        piece_W = total_W[start : start + STREAM_PIECE]
        count = len(piece_W)
        for cipher, sign in ciphers:
            cipher.update_into(zeros[: 8 * count] if count < STREAM_PIECE else zeros, buffer)
            (np.add if sign else np.subtract)(piece_W, drawn_W[:count], out=piece_W)
