"""Identities: one certificate for each party, all signed by the federation's certificate authority.

A party's name is the common name of its certificate, never a field of a message, and its role is the certificate's
organizational unit. TLS itself lets a silo's certificate only connect and that of trunk or root only serve, by the
extended key usage; an edge's does both. Silos check that the server's certificate was issued to ``trunk``, ``root`` or
the edge of the recipe; the server checks role and name of who connects; and of silos alone a signature counts.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isthmus.errors import IdentityError

Role = Literal["silo", "edge", "trunk", "root"]
_SERVES, _CONNECTS = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
_USAGES: dict[Role, list[x509.ObjectIdentifier]] = {
    "silo": [_CONNECTS],
    "edge": [_SERVES, _CONNECTS],
    "trunk": [_SERVES],
    "root": [_SERVES],
}
_SIGNATURE = ec.ECDSA(hashes.SHA256())
_REMEDY = (
    "make certificates with 'isthmus certificates RECIPE' and give each party its folder; "
    "wire.certificates in the recipe names the folder that holds it"
)


@dataclass(frozen=True)
class Identity:
    """One party's credentials."""

    name: str
    authority: bytes
    """PEM certificate of the federation's authority."""
    certificate: bytes
    """PEM certificate of the party."""
    key: bytes
    """PEM private key of the party."""
    _issued: set[x509.Certificate] = field(default_factory=set, init=False, repr=False, compare=False)
    """Cache of certificates whose signature by the authority was verified; the same ones come every round."""
    _read: dict[str, tuple[bytes, x509.Certificate]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Cache of the last valid certificate of each name, as PEM and parsed."""

    @classmethod
    def load(cls, folder: Path, name: str, role: Role) -> Identity:
        """The identity in ``folder/name``, of a party with this role.

        Raises:
            IdentityError: a file is missing or unreadable, or the certificate is expired, of another authority, of
                another party or for another role.
        """
        place = folder / name
        try:
            parts = [(place / file).read_bytes() for file in ("ca.pem", "cert.pem", "key.pem")]
        except OSError as error:
            raise IdentityError(f"no certificate of {name}: cannot read {error.filename}", remedy=_REMEDY) from error
        identity = cls(name, *parts)
        identity.check(role)
        return identity

    def check(self, role: Role) -> None:
        """Raise ``IdentityError`` unless the certificate is this party's, for this role, valid now and signed by the
        authority."""
        try:
            certificate = x509.load_pem_x509_certificate(self.certificate)
            key = serialization.load_pem_private_key(self.key, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise IdentityError(f"the certificate or key of {self.name} is damaged", remedy=_REMEDY) from error
        self._check_certificate(certificate, self.name, role)
        if key.public_key() != certificate.public_key():
            raise IdentityError(f"the certificate of {self.name} belongs to another key", remedy=_REMEDY)

    def sign(self, data: bytes) -> bytes:
        """This party's signature of the data (ECDSA with SHA-256, by the certificate's key)."""
        return self._key.sign(data, _SIGNATURE)

    def verify(self, name: str, certificate: bytes, signature: bytes, data: bytes, *, role: Role = "silo") -> None:
        """Check a party's signature.

        Args:
            name: the party's name.
            certificate: its PEM certificate, as received.
            role: the party's.

        Raises:
            IdentityError: the certificate is not valid for a party of this name and role, or the signature does not
                match the data.
        """
        text, loaded = self._read.get(name, (b"", None))
        try:
            if loaded is None or text != certificate:
                loaded = x509.load_pem_x509_certificate(certificate)
            key = loaded.public_key()
        except (ValueError, UnsupportedAlgorithm) as error:
            raise IdentityError(f"the certificate of {name} is damaged", remedy=_REMEDY) from error
        self._check_certificate(loaded, name, role)
        self._read[name] = certificate, loaded
        try:
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise InvalidSignature
            key.verify(signature, data, _SIGNATURE)
        except InvalidSignature as error:
            raise IdentityError(
                f"the signature of {name} is not valid for the data received",
                remedy=f"check the certificate and key of {name}; if they are its own, the data was changed on the way",
            ) from error

    @cached_property
    def _key(self) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_pem_private_key(self.key, password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)  # as ``Authority`` issues them
        return key

    @cached_property
    def _issuer(self) -> x509.Certificate:
        try:
            issuer = x509.load_pem_x509_certificate(self.authority)
            if issuer.issuer == issuer.subject:
                issuer.verify_directly_issued_by(issuer)
            return issuer
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
            raise IdentityError("the authority's certificate is damaged", remedy=_REMEDY) from error

    def _check_certificate(self, certificate: x509.Certificate, name: str, role: Role) -> None:
        """Raise ``IdentityError`` unless the certificate has this name and role, is valid now and is signed by the
        authority."""
        if certificate not in self._issued:
            try:
                certificate.verify_directly_issued_by(self._issuer)
            except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
                raise IdentityError(
                    f"the certificate of {name} is from another authority, or damaged", remedy=_REMEDY
                ) from error
            self._issued.add(certificate)
        now = datetime.datetime.now(datetime.UTC)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            end = certificate.not_valid_after_utc.date()
            raise IdentityError(f"the certificate of {name} is not valid now (it ends {end})", remedy=_REMEDY)
        if common_name(certificate) != name:
            raise IdentityError(f"the certificate of {name} is {common_name(certificate)}'s", remedy=_REMEDY)
        check_role(certificate, role)

    def client_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a channel that this party opens."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server that this party runs, which requires client certificates of the same authority."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], root_certificates=self.authority, require_client_auth=True
        )


class Authority:
    """The federation's certificate authority. Its private key exists in this object only.

    Args:
        days: validity of its certificate, and by default of those it issues.
    """

    def __init__(self, *, days: float = 365.0) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._days = days
        self._certificate = self._sign("isthmus federation", self._key, x509.BasicConstraints(ca=True, path_length=0))

    def issue(
        self, name: str, role: Role | None = None, *, also: tuple[str, ...] = (), days: float | None = None
    ) -> Identity:
        """A new identity for this party.

        Args:
            name: the party's name.
            role: by default that of the name: of trunk and root their own, of any other a silo's.
            also: further host names for which a server may use the certificate.
            days: validity from now; negative: already expired.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        constraints = x509.BasicConstraints(ca=False, path_length=None)
        if role is None:
            role = cast(Role, name) if name in ("trunk", "root") else "silo"
        certificate = self._sign(name, key, constraints, role=role, names=(name, *also), days=days)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Identity(name, _pem(self._certificate), _pem(certificate), private)

    def _sign(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        constraints: x509.BasicConstraints,
        *,
        role: Role | None = None,
        names: tuple[str, ...] = (),
        days: float | None = None,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        end = now + datetime.timedelta(days=self._days if days is None else days)
        issuer = name if constraints.ca else common_name(self._certificate)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_x509_name(name, role))
            .issuer_name(_x509_name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, end) - datetime.timedelta(hours=1))
            .not_valid_after(end)
            .add_extension(constraints, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if role is not None:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName(other) for other in names]), critical=False
            ).add_extension(x509.ExtendedKeyUsage(_USAGES[role]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def save_identity(identity: Identity, folder: Path) -> None:
    """Write an identity to ``folder/name``, with the private key readable by its owner only."""
    place = folder / identity.name
    place.mkdir(parents=True, exist_ok=True)
    (place / "ca.pem").write_bytes(identity.authority)
    (place / "cert.pem").write_bytes(identity.certificate)
    key = place / "key.pem"
    key.touch(mode=0o600)
    key.chmod(0o600)  # also for an existing file
    key.write_bytes(identity.key)


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


def _x509_name(name: str, role: Role | None = None) -> x509.Name:
    unit = [] if role is None else [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role)]
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), *unit])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
