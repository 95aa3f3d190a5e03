"""The federation's certificate authority: it signs who a party is, for a time, and takes that back."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isthmus.errors import IdentityError
from isthmus.wire.identity import Identity, Role, roster_bytes

_SERVES, _CONNECTS = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
_USAGES: dict[Role, list[x509.ObjectIdentifier]] = {
    "silo": [_CONNECTS],
    "edge": [_SERVES, _CONNECTS],
    "trunk": [_SERVES, _CONNECTS],
    "root": [_SERVES, _CONNECTS],
}
CLOCK_SLACK = datetime.timedelta(hours=1)
"""How long before it was issued a certificate is valid, for clocks that differ."""
LIST_DAYS = 3650.0
"""Validity of a list of revoked certificates: a party that gets no newer one goes on with what it has."""


class Authority:
    """A certificate authority. Its private key exists in this object, and in the files that ``key`` is written to.

    Args:
        days: validity of its certificate, and by default of those it issues.
    """

    def __init__(self, *, days: float = 365.0) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._days = days
        name = x509_name("isthmus federation")
        self._certificate = signed_certificate(name, name, self._key.public_key(), self._key, days=days)

    @classmethod
    def load(cls, certificate: bytes, key: bytes, *, days: float) -> Authority:
        """An authority from its PEM certificate and private key.

        Args:
            days: validity of the certificates that it issues.

        Raises:
            IdentityError: one is damaged, or they do not belong together.
        """
        authority = cls.__new__(cls)
        try:
            read = serialization.load_pem_private_key(key, password=None)
            authority._certificate = x509.load_pem_x509_certificate(certificate)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise IdentityError("the authority's certificate or key is damaged", remedy=_RESTORE) from error
        if not isinstance(read, ec.EllipticCurvePrivateKey) or read.public_key() != authority._certificate.public_key():
            raise IdentityError("the authority's certificate belongs to another key", remedy=_RESTORE)
        authority._key, authority._days = read, days
        return authority

    @property
    def certificate(self) -> bytes:
        """Its PEM certificate."""
        return _pem(self._certificate)

    @property
    def key(self) -> bytes:
        """Its private key, as PEM."""
        return private_pem(self._key)

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """Its public key."""
        return self._key.public_key()

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
        if role is None:
            role = cast(Role, name) if name in ("trunk", "root") else "silo"
        certificate = self._sign(name, role, key.public_key(), also, days)
        return Identity(name, self.certificate, _pem(certificate), private_pem(key))

    def answer(
        self, request: bytes, name: str, role: Role, *, also: tuple[str, ...] = (), days: float | None = None
    ) -> bytes:
        """A PEM certificate of the key in a signing request. Name and role are these, whatever the request says.

        Args:
            request: PEM signing request.
            also, days: as in ``issue``.

        Raises:
            IdentityError: it is no request, is not signed by its key, or its key is not RSA or ECDSA, or too small.
        """
        try:
            read = x509.load_pem_x509_csr(request)
            key = read.public_key()
            if not read.is_signature_valid:
                raise InvalidSignature
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
            raise IdentityError("a signing request that is damaged, or not signed by its key", remedy=_AGAIN) from error
        if (isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048) or isinstance(key, ec.EllipticCurvePublicKey):
            return _pem(self._sign(name, role, key, also, days))
        raise IdentityError("a signing request for a key that is neither ECDSA nor RSA of 2,048 bits", remedy=_AGAIN)

    def revocations(self, revoked: Mapping[int, datetime.datetime]) -> bytes:
        """The PEM list of revoked certificates.

        Args:
            revoked: by serial number, when.
        """
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._certificate.subject)
        builder = builder.last_update(now).next_update(now + datetime.timedelta(days=LIST_DAYS))
        for serial, when in revoked.items():
            one = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
            builder = builder.add_revoked_certificate(one)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def roster(self, silos: Iterable[str]) -> bytes:
        """The signed list of silos that were added since the federation began (see ``Identity.added``): the same bytes
        for the same silos, so that who keeps it sees whether it changed."""
        names = sorted(silos)
        signature = self._key.sign(roster_bytes(names), ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
        return json.dumps({"silos": names, "signature": signature.hex()}).encode()

    def _sign(
        self,
        name: str,
        role: Role,
        key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
        also: tuple[str, ...],
        days: float | None,
    ) -> x509.Certificate:
        return signed_certificate(
            x509_name(name, role),
            self._certificate.subject,
            key,
            self._key,
            days=self._days if days is None else days,
            names=(name, *also),
            usages=_USAGES[role],
        )


_RESTORE = "restore the authority's folder from a copy, or begin a new one with 'isthmus authority init'"
_AGAIN = "run 'isthmus join' again; both sides must run the same version of isthmus"


def signed_certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    days: float,
    names: tuple[str, ...] = (),
    usages: list[x509.ObjectIdentifier] | None = None,
) -> x509.Certificate:
    """A certificate of this public key.

    Args:
        days: validity from now, and ``CLOCK_SLACK`` before; negative: already expired.
        names: host names of a server.
        usages: extended key usages; None: it is an authority's certificate, under which no other authority may be.
    """
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    constraints = x509.BasicConstraints(ca=usages is None, path_length=0 if usages is None else None)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - CLOCK_SLACK)
        .not_valid_after(end)
        .add_extension(constraints, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(list(map(x509.DNSName, names))), critical=False)
    if usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(signer, hashes.SHA256())


def signing_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A PEM signing request of this key. It names nobody: who the party is, its invite or last certificate says."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def x509_name(name: str, role: str | None = None) -> x509.Name:
    """The subject of a party's certificate: its name, and its role as organizational unit."""
    unit = [] if role is None else [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role)]
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), *unit])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
