"""Invites: one line with which a party that has no certificate yet asks for one, once.

Both sides derive a key pair from the invite's secret. It signs a certificate of the guest, and the server trusts the
public half while the invite is open: so TLS itself knows a guest, over the port that everything else goes through. The
guest knows the federation by its authority's public key, which is in the invite, too. Whoever relays what they say can
neither read nor change it.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import secrets
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID

from isthmus.errors import IdentityError, RecipeError
from isthmus.recipe.address import checked_address
from isthmus.wire.authority import private_pem, signed_certificate, x509_name
from isthmus.wire.identity import Identity, Role

INVITE_PREFIX = "isthmus:"
GUEST = "guest"
"""The organizational unit of a guest's certificate: no role."""
SECRET_BYTES = 16
_LONG = 3650.0
_CURVE = ec.SECP256R1()
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_ROLES: tuple[Role, ...] = get_args(Role)
_HEAD = struct.Struct(">B33s16sI")
"""Role, the authority's public key, the secret, and the second at which it ends; name, server and address follow."""


@dataclass(frozen=True)
class Invite:
    """What a guest needs to become a party."""

    name: str
    """Of the party."""
    role: Role
    address: str
    """``host:port`` of a server that answers guests."""
    server: str
    """The name on that server's certificate."""
    authority: bytes
    """The public key of the federation's authority: a compressed point of P-256."""
    secret: bytes
    expires: datetime.datetime

    @classmethod
    def make(
        cls, name: str, role: Role, address: str, server: str, authority: ec.EllipticCurvePublicKey, *, days: float
    ) -> Invite:
        """A new invite, open for this many days.

        Raises:
            RecipeError: the address is no ``host:port``.
        """
        ends = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)).replace(microsecond=0)
        point = compressed(authority)
        return cls(name, role, checked_address(address), server, point, secrets.token_bytes(SECRET_BYTES), ends)

    @classmethod
    def parse(cls, line: str) -> Invite:
        """The invite in a line.

        Raises:
            IdentityError: it is none, or not whole.
        """
        text = "".join(line.split())
        try:
            if not text.startswith(INVITE_PREFIX):
                raise ValueError
            text = text.removeprefix(INVITE_PREFIX)
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            data, check = data[:-4], data[-4:]
            if _checksum(data) != check:
                raise ValueError
            number, authority, secret, ends = _HEAD.unpack_from(data)
            name, server, address = data[_HEAD.size :].decode().split("\n")
            expires = datetime.datetime.fromtimestamp(ends, datetime.UTC)
            invite = cls(name, _ROLES[number], checked_address(address), server, authority, secret, expires)
            if str(invite) != INVITE_PREFIX + text:
                raise ValueError
            return invite
        except (ValueError, IndexError, OverflowError, struct.error, RecipeError) as error:
            raise IdentityError(
                "this is no invite, or not the whole of one",
                remedy=f"copy the line that 'isthmus invite' printed, from '{INVITE_PREFIX}' to its end",
            ) from error

    def __str__(self) -> str:
        head = _HEAD.pack(_ROLES.index(self.role), self.authority, self.secret, int(self.expires.timestamp()))
        data = head + "\n".join((self.name, self.server, self.address)).encode()
        return INVITE_PREFIX + base64.urlsafe_b64encode(data + _checksum(data)).decode().rstrip("=")

    @property
    def id(self) -> str:
        """What the authority knows it by, which tells nothing of the secret."""
        return hashlib.sha256(b"isthmus invite id\0" + self.secret).hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        """Of the authority's key, for people to compare."""
        return fingerprint(self.authority)

    @cached_property
    def _key(self) -> ec.EllipticCurvePrivateKey:
        """The key pair that both sides derive."""
        derive = HKDF(hashes.SHA256(), 48, salt=None, info=b"isthmus invite key")
        return ec.derive_private_key(1 + int.from_bytes(derive.derive(self.secret)) % (_ORDER - 1), _CURVE)

    @property
    def anchor(self) -> bytes:
        """The PEM certificate by which the server trusts the guest."""
        subject = self._anchor_name()
        made = signed_certificate(subject, subject, self._key.public_key(), self._key, days=_LONG)
        return made.public_bytes(serialization.Encoding.PEM)

    def guest(self) -> Identity:
        """What the guest shows, and trusts. It serves for a first request alone.

        Its certificate is valid for long, as the anchor is: that the invite expired, the server says in words.
        """
        key = ec.generate_private_key(_CURVE)
        subject, usages = x509_name(self.id, GUEST), [ExtendedKeyUsageOID.CLIENT_AUTH]
        own = signed_certificate(subject, self._anchor_name(), key.public_key(), self._key, days=_LONG, usages=usages)
        return Identity(self.id, self._trusted(), own.public_bytes(serialization.Encoding.PEM), private_pem(key))

    def _anchor_name(self) -> x509.Name:
        return x509_name(f"invite {self.id}")

    def _trusted(self) -> bytes:
        """A PEM certificate that holds the authority's name and key. TLS trusts it for these; nothing checks who
        signed a certificate that is trusted by itself, and the authority's own is not known yet."""
        key = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, self.authority)
        subject = x509_name("isthmus federation")
        made = signed_certificate(subject, subject, key, ec.generate_private_key(_CURVE), days=_LONG)
        return made.public_bytes(serialization.Encoding.PEM)


def compressed(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key of P-256 in 33 bytes."""
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)


def fingerprint(authority: bytes) -> str:
    """What people compare of an authority's compressed public key: eight groups of four hex digits."""
    digest = hashlib.sha256(authority).hexdigest()[:32]
    return " ".join(digest[start : start + 4] for start in range(0, 32, 4))


def key_of(certificate: bytes) -> bytes:
    """The compressed public key of an authority's PEM certificate; empty if it is no ECDSA key."""
    key = x509.load_pem_x509_certificate(certificate).public_key()
    return compressed(key) if isinstance(key, ec.EllipticCurvePublicKey) else b""


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(b"isthmus invite\0" + data).digest()[:4]
