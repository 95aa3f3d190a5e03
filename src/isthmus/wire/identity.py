"""Identities: one certificate for each party, all signed by the federation's certificate authority.

A party's name is the common name of its certificate, never a field of a message, and its role is the certificate's
organizational unit. TLS itself lets a silo's certificate only connect, by the extended key usage; those of servers do
both, for they ask the authority to renew them. Silos check that the server's certificate was issued to ``trunk``,
``root`` or the edge of the recipe; the server checks role and name of who connects; and of silos alone a signature
counts.
"""

from __future__ import annotations

import datetime
import json
import logging
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

from isthmus.errors import IdentityError

Role = Literal["silo", "edge", "trunk", "root"]
CA, CERTIFICATE, KEY, REVOKED = "ca.pem", "cert.pem", "key.pem", "revoked.pem"
ROSTER = "roster.json"
"""The signed list of silos that were added since the federation began."""
NEXT_KEY = "key.next.pem"
"""The key of a certificate that is being replaced; it counts as soon as the certificate belongs to it."""
_ECDSA = ec.ECDSA(hashes.SHA256())
_PSS = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
_ISSUERS = ExtensionPolicy.permit_all().require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
_REMEDY = (
    "join with an invite of who leads the federation, or make certificates with 'isthmus certificates RECIPE'; "
    "wire.certificates in the recipe names the folder that holds it"
)

_RENEWAL = "ask who leads the federation for a new invite, or make certificates with 'isthmus certificates RECIPE'"
_FETCHED = "delete the file; it is fetched again"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """One party's credentials.

    A federation's own authority is a single certificate that signs all others with ECDSA; an organization's may be
    several roots, with intermediate authorities, and RSA or ECDSA keys.
    """

    name: str
    authority: bytes
    """PEM certificate of the federation's authority, or several."""
    certificate: bytes
    """PEM certificate of the party; after it those of intermediate authorities."""
    key: bytes
    """PEM private key of the party."""
    revoked: bytes = b""
    """PEM list of revoked certificates, signed by the authority; empty: none is known."""
    roster: bytes = b""
    """JSON list of silos that were added since the federation began, signed by the authority; empty: none is known."""
    _source: IdentityFiles | None = field(default=None, repr=False, compare=False)
    """Where it was read."""
    _issued: dict[x509.Certificate, datetime.datetime] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Cache of certificates whose signature by the authority was verified, with the time until which that holds; the
    same ones come every round."""
    _read: dict[str, tuple[bytes, list[x509.Certificate]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Cache of the last valid certificate of each name, as PEM and parsed."""

    @classmethod
    def load(cls, folder: Path, name: str, role: Role) -> Identity:
        """The identity in ``folder/name``, of a party with this role.

        Raises:
            IdentityError: a file is missing or unreadable, others may read the key, or the certificate is expired,
                revoked, of another authority, of another party or for another role.
        """
        source = IdentityFiles.of(folder, name, role)
        _check_mode(source.place / KEY, name)
        identity = cls(name, *source.read(), _source=source)
        identity.check(role)
        return identity

    def renewed(self) -> Identity:
        """This identity as its files are now. It is the same object while they say the same, or cannot be used."""
        source = self._source
        if source is None or source.unchanged():
            return self
        try:
            found = Identity.load(source.place.parent, self.name, source.role)
        except IdentityError as error:  # perhaps half of the files are written
            log.debug("the new certificate of %s is not used: %s", self.name, error)
            return self
        return self if found == self else found

    def check(self, role: Role) -> None:
        """Raise ``IdentityError`` unless the certificate is this party's, for this role, valid now and signed by the
        authority."""
        try:
            chain = x509.load_pem_x509_certificates(self.certificate)
            key = serialization.load_pem_private_key(self.key, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise IdentityError(f"the certificate or key of {self.name} is damaged", remedy=_REMEDY) from error
        self._check_certificate(chain, self.name, role)
        if key.public_key() != chain[0].public_key():
            raise IdentityError(f"the certificate of {self.name} belongs to another key", remedy=_REMEDY)

    def check_peer(self, certificate: bytes, name: str, role: Role) -> None:
        """Raise ``IdentityError`` unless this PEM certificate is one of the party of this name, for this role, valid
        now, signed by the authority and not revoked."""
        self._check_certificate(_parsed(certificate, name), name, role)

    @cached_property
    def added(self) -> frozenset[str]:
        """Silos that were added to the federation since it began, as the authority says. A silo may be in a masked sum
        with them, too: who signs certificates could as well pose as a silo that the recipe has.

        Raises:
            IdentityError: the list is damaged, or not the authority's.
        """
        if not self.roster:
            return frozenset()
        try:
            read = json.loads(self.roster)
            names, signature = [str(name) for name in read["silos"]], bytes.fromhex(read["signature"])
            for issuer in self._issuers:
                with suppress(InvalidSignature):
                    _verify_signature(issuer.public_key(), signature, roster_bytes(names))
                    return frozenset(names)
        except (ValueError, LookupError, TypeError) as error:
            raise IdentityError(f"{ROSTER} of {self.name} is damaged", remedy=_FETCHED) from error
        raise IdentityError(f"{ROSTER} of {self.name} is not the authority's", remedy=_FETCHED)

    @cached_property
    def ends(self) -> datetime.datetime:
        """When the certificate expires."""
        return _parsed(self.certificate, self.name)[0].not_valid_after_utc

    def sign(self, data: bytes) -> bytes:
        """This party's signature of the data with SHA-256 by the certificate's key: ECDSA, or RSA-PSS."""
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            return self._key.sign(data, _ECDSA)
        return self._key.sign(data, _PSS, hashes.SHA256())

    def verify(self, name: str, certificate: bytes, signature: bytes, data: bytes, *, role: Role = "silo") -> None:
        """Check a party's signature.

        Args:
            name: the party's name.
            certificate: its PEM certificate, as received, with those of intermediate authorities.
            role: the party's.

        Raises:
            IdentityError: the certificate is not valid for a party of this name and role, or the signature does not
                match the data.
        """
        text, chain = self._read.get(name, (b"", []))
        if not chain or text != certificate:
            chain = _parsed(certificate, name)
        self._check_certificate(chain, name, role)
        self._read[name] = certificate, chain
        try:
            _verify_signature(chain[0].public_key(), signature, data)
        except (InvalidSignature, ValueError, UnsupportedAlgorithm) as error:
            raise IdentityError(
                f"the signature of {name} is not valid for the data received",
                remedy=f"check the certificate and key of {name}; if they are its own, the data was changed on the way",
            ) from error

    @cached_property
    def _key(self) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey:
        key = serialization.load_pem_private_key(self.key, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise IdentityError(f"the key of {self.name} is neither RSA nor ECDSA", remedy=_REMEDY)
        return key

    @cached_property
    def _issuers(self) -> list[x509.Certificate]:
        try:
            issuers = x509.load_pem_x509_certificates(self.authority)
            for issuer in issuers:
                if issuer.issuer == issuer.subject:
                    issuer.verify_directly_issued_by(issuer)
            return issuers
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
            raise IdentityError("the authority's certificate is damaged", remedy=_REMEDY) from error

    @cached_property
    def _revocations(self) -> dict[int, datetime.datetime]:
        """By serial number, when a certificate was revoked."""
        if not self.revoked:
            return {}
        try:
            listed = x509.load_pem_x509_crl(self.revoked)
            if not any(listed.is_signature_valid(_signing_key(issuer)) for issuer in self._issuers):
                raise InvalidSignature
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
            raise IdentityError(
                f"the list of revoked certificates of {self.name} is damaged, or from another authority",
                remedy=f"delete {REVOKED} in its folder; it is fetched again",
            ) from error
        return {one.serial_number: one.revocation_date_utc for one in listed}

    def _check_certificate(self, chain: list[x509.Certificate], name: str, role: Role) -> None:
        """Raise ``IdentityError`` unless the chain's first certificate has this name and role, is valid now, is signed
        by the authority, directly or through the others, and not revoked."""
        certificate, now = chain[0], datetime.datetime.now(datetime.UTC)
        _check_dates(certificate, name, now)
        if certificate not in self._issued or self._issued[certificate] < now:
            self._issued[certificate] = self._trusted_until(chain, name, now)
        if (when := self._revocations.get(certificate.serial_number)) is not None:
            raise IdentityError(
                f"the certificate of {name} was revoked on {when.date()}",
                remedy=f"if {name} is to come back, ask who leads the federation for a new invite",
            )
        if common_name(certificate) != name:
            raise IdentityError(f"the certificate of {name} is {common_name(certificate)}'s", remedy=_REMEDY)
        check_role(certificate, role)

    def _trusted_until(self, chain: list[x509.Certificate], name: str, now: datetime.datetime) -> datetime.datetime:
        """Until when the chain from this certificate to the authority is valid."""
        policy = PolicyBuilder().store(Store(self._issuers)).time(now)
        policy = policy.extension_policies(ca_policy=_ISSUERS, ee_policy=ExtensionPolicy.permit_all())
        try:
            path = policy.build_client_verifier().verify(chain[0], chain[1:]).chain
        except (VerificationError, ValueError) as error:
            raise IdentityError(
                f"the certificate of {name} was signed by another authority, or is damaged", remedy=_REMEDY
            ) from error
        return min(one.not_valid_after_utc for one in path)

    def client_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a channel that this party opens."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    def server_configuration(self, guests: bytes = b"") -> grpc.ServerCertificateConfiguration:
        """What a server of this party shows and trusts.

        Args:
            guests: PEM certificates of further authorities, of which clients may be.
        """
        pair = [(self.key, self.certificate)]
        return grpc.ssl_server_certificate_configuration(pair, root_certificates=self.authority + guests)


@dataclass(frozen=True)
class IdentityFiles:
    """Where an identity was read, for which role, and in what state the files were."""

    place: Path
    role: Role
    state: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, folder: Path, name: str, role: Role) -> IdentityFiles:
        """The files in ``folder/name`` as they are now."""
        return cls(folder / name, role, _state(folder / name))

    def unchanged(self) -> bool:
        """Whether the files are as they were."""
        return self.state == _state(self.place)

    def read(self) -> tuple[bytes, bytes, bytes, bytes, bytes]:
        """Authority, certificate, key, revoked certificates, added silos.

        Raises:
            IdentityError: one that must be there cannot be read.
        """
        try:
            authority, certificate, key = ((self.place / file).read_bytes() for file in (CA, CERTIFICATE, KEY))
            with suppress(FileNotFoundError, ValueError):
                following = (self.place / NEXT_KEY).read_bytes()
                read = serialization.load_pem_private_key(following, password=None)
                if x509.load_pem_x509_certificate(certificate).public_key() == read.public_key():
                    key = following
        except OSError as error:
            raise IdentityError(
                f"no certificate of {self.place.name}: cannot read {error.filename}", remedy=_REMEDY
            ) from error
        revoked, roster = (
            place.read_bytes() if place.exists() else b"" for place in (self.place / REVOKED, self.place / ROSTER)
        )
        return authority, certificate, key, revoked, roster


def save_identity(identity: Identity, folder: Path) -> None:
    """Write an identity to ``folder/name``, with the private key readable by its owner only."""
    place = folder / identity.name
    place.mkdir(parents=True, exist_ok=True)
    (place / CA).write_bytes(identity.authority)
    (place / CERTIFICATE).write_bytes(identity.certificate)
    key = place / KEY
    key.touch(mode=0o600)
    key.chmod(0o600)  # also for an existing file
    key.write_bytes(identity.key)
    if identity.revoked:
        (place / REVOKED).write_bytes(identity.revoked)


def replace_certificate(place: Path, certificate: bytes, key: bytes) -> None:
    """Give a party's folder a new certificate and key, so that at every moment it holds a pair that belongs together.

    Args:
        place: the party's own folder.
    """
    for file, data in ((NEXT_KEY, key), (CERTIFICATE, certificate)):
        part = place / f".{file}.part"
        part.touch(mode=0o600)
        part.write_bytes(data)
        part.replace(place / file)
    (place / NEXT_KEY).replace(place / KEY)


def roster_bytes(silos: list[str]) -> bytes:
    """What the authority signs of a list of silos."""
    return b"\0".join((b"isthmus silos that were added", *(name.encode() for name in sorted(silos))))


def common_name(certificate: x509.Certificate) -> str:
    """The common name of a certificate's subject; empty if it has none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def check_role(certificate: x509.Certificate, role: Role) -> None:
    """Check what the certificate says that its party is.

    Raises:
        IdentityError: it has another role, or none.
    """
    found = [str(one.value) for one in certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)]
    if role not in found:
        stated = f"that of the {found[0][:64]}" if found else "one without a role"
        raise IdentityError(
            f"the certificate of {common_name(certificate)[:64]} is {stated}, {role} is needed",
            remedy=_REMEDY,
        )


def _state(place: Path) -> tuple[tuple[int, int], ...]:
    """What changes when one of the files is written."""
    found = []
    for file in (CA, CERTIFICATE, KEY, REVOKED, ROSTER):
        try:
            stated = (place / file).stat()
            found.append((stated.st_ino, stated.st_mtime_ns))
        except OSError:
            found.append((0, 0))
    return tuple(found)


def _check_mode(key: Path, name: str) -> None:
    """Refuse a key that others may read. One that root owns may be for a group, as secrets that are mounted are."""
    try:
        stated = key.stat()
    except OSError:
        return  # reading it says what is wrong
    forbidden = 0o037 if stated.st_uid == 0 else 0o077
    if stated.st_mode & forbidden:
        raise IdentityError(
            f"others may read the private key of {name}: {key} has mode {stat.S_IMODE(stated.st_mode):04o}",
            remedy=f"chmod 600 {key}; if others had access, ask for a new certificate",
        )


def _parsed(certificate: bytes, name: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(certificate)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"the certificate of {name} is damaged", remedy=_REMEDY) from error


def _check_dates(certificate: x509.Certificate, name: str, now: datetime.datetime) -> None:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise IdentityError(f"the certificate of {name} expired on {end.date()}", remedy=_RENEWAL)
    if now < begin:
        raise IdentityError(
            f"the certificate of {name} is valid from {begin:%Y-%m-%d %H:%M} UTC on, and it is "
            f"{now:%Y-%m-%d %H:%M} by this machine's clock",
            remedy="set the clock right",
        )


def _verify_signature(key: Any, signature: bytes, data: bytes) -> None:
    """Raises ``InvalidSignature`` unless the key made the signature of the data."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, data, _ECDSA)
    elif isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, data, _PSS, hashes.SHA256())
    else:
        raise InvalidSignature


def _signing_key(issuer: x509.Certificate) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    key = issuer.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise UnsupportedAlgorithm("neither RSA nor ECDSA")
    return key
