"""The authority: what it signs and takes back; and certificates of an organization's own authority."""

from __future__ import annotations

import dataclasses
import datetime
from contextlib import closing
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from isthmus.errors import IdentityError
from isthmus.wire.authority import Authority, private_pem, signing_request, x509_name
from isthmus.wire.identity import Identity, save_identity
from tests.conformance.test_channels import Echo, ask, number, serving
from tests.unit.wire.test_identity import GrpcChannel

OURS = Authority(days=30)
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
KINDS = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
}


def own_certificate(name: str, issuer: str, key: Key, signer: Key, *, role: str | None, days: float = 10) -> bytes:
    """A certificate as another program than ours makes it; without a role an authority's."""
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days)
    builder = x509.CertificateBuilder(
        x509_name(issuer), x509_name(name, role), key.public_key(), x509.random_serial_number()
    )
    builder = builder.not_valid_before(min(now, end) - datetime.timedelta(1)).not_valid_after(end)
    builder = builder.add_extension(x509.BasicConstraints(ca=role is None, path_length=None), critical=True)
    if role is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def of_organization(kind: str, name: str, role: str, *, days: float = 10) -> Identity:
    """A party under two intermediate authorities of an organization's root; all keys of this kind."""
    made = _organization(kind)
    key = KINDS[kind]()
    leaf = own_certificate(name, "office", key, made["office"][1], role=role, days=days)
    return Identity(name, made["root"][0], leaf + made["office"][0] + made["department"][0], _pem(key))


_known: dict[str, dict[str, tuple[bytes, Key]]] = {}


def _organization(kind: str) -> dict[str, tuple[bytes, Key]]:
    if kind not in _known:
        root, department, office = (KINDS[kind]() for _ in range(3))
        _known[kind] = {
            "root": (own_certificate("hospital", "hospital", root, root, role=None), root),
            "department": (own_certificate("department", "hospital", department, root, role=None), department),
            "office": (own_certificate("office", "department", office, department, role=None), office),
        }
    return _known[kind]


def _pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_certificates_of_an_organizations_own_authority_connect_and_sign(kind: str, tmp_path: Path) -> None:
    silo, trunk = of_organization(kind, "a", "silo"), of_organization(kind, "trunk", "trunk")
    save_identity(silo, tmp_path)
    loaded = Identity.load(tmp_path, "a", "silo")
    with (
        serving({"Trunk": Echo()}, identity=trunk) as server,
        closing(GrpcChannel(f"localhost:{server.port}", "Trunk", loaded, deadline=20.0)) as channel,
    ):
        assert ask(channel, number(1)) == number(1)
    trunk.verify("a", loaded.certificate, loaded.sign(b"keys"), b"keys")
    with pytest.raises(IdentityError, match="is not valid for the data"):
        trunk.verify("a", loaded.certificate, loaded.sign(b"keys"), b"other")


@pytest.mark.parametrize("kind", KINDS)
def test_of_an_organizations_authority_too_each_check_holds(kind: str) -> None:
    trunk = of_organization(kind, "trunk", "trunk")
    expired, other = of_organization(kind, "a", "silo", days=-1), of_organization(kind, "b", "silo")
    as_edge = of_organization(kind, "a", "edge")
    alone = Identity(
        "a",
        b"",
        of_organization(kind, "a", "silo").certificate.split(b"-----END")[0] + b"-----END CERTIFICATE-----\n",
        b"",
    )
    for identity, told in (
        (expired, "expired on"),
        (other, "is b's"),
        (as_edge, "that of the edge, silo is needed"),
        (alone, "another authority"),
        (OURS.issue("a"), "another authority"),
    ):
        with pytest.raises(IdentityError, match=told):
            trunk.check_peer(identity.certificate, "a", "silo")


def test_a_silo_under_a_silos_certificate_is_nobody() -> None:
    """A party cannot issue certificates with its own."""
    north = OURS.issue("north")
    signer = serialization.load_pem_private_key(north.key, None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    forged = own_certificate("south", "north", key, signer, role="silo")
    with pytest.raises(IdentityError, match="another authority"):
        OURS.issue("trunk").check_peer(forged + north.certificate, "south", "silo")


def test_an_authority_is_loaded_as_it_was_saved() -> None:
    again = Authority.load(OURS.certificate, OURS.key, days=1)
    again.issue("north").check("silo")
    OURS.issue("trunk").check_peer(again.issue("north").certificate, "north", "silo")


@pytest.mark.parametrize(
    ("certificate", "key"),
    [
        (OURS.certificate, b"damaged"),
        (b"damaged", OURS.key),
        (OURS.certificate, Authority().key),
        (OURS.certificate, _pem(rsa.generate_private_key(65537, 2048))),
    ],
)
def test_a_damaged_authority_is_refused(certificate: bytes, key: bytes) -> None:
    with pytest.raises(IdentityError, match="authority's certificate") as caught:
        Authority.load(certificate, key, days=1)
    assert "copy" in caught.value.remedy


def test_name_and_role_are_the_authoritys_whatever_a_request_says() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    wish = x509.CertificateSigningRequestBuilder().subject_name(x509_name("root", "root"))
    request = wish.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    for one in (request, signing_request(key)):
        certificate = OURS.answer(one, "north", "silo")
        Identity("north", OURS.certificate, certificate, private_pem(key)).check("silo")


def test_requests_that_are_refused() -> None:
    small, odd = rsa.generate_private_key(65537, 1024), ed25519.Ed25519PrivateKey.generate()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    for data in (
        b"",
        b"nothing",
        builder.sign(small, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        builder.sign(odd, None).public_bytes(serialization.Encoding.PEM),
    ):
        with pytest.raises(IdentityError, match="a signing request"):
            OURS.answer(data, "north", "silo")


def test_revoked_certificates_are_known_by_day_and_only_they() -> None:
    north, south = OURS.issue("north"), OURS.issue("south")
    serial = x509.load_pem_x509_certificate(north.certificate).serial_number
    when = datetime.datetime(2026, 3, 4, tzinfo=datetime.UTC)
    trunk = OURS.issue("trunk")
    trunk = Identity("trunk", trunk.authority, trunk.certificate, trunk.key, OURS.revocations({serial: when}))
    trunk.check_peer(south.certificate, "south", "silo")
    with pytest.raises(IdentityError, match="revoked on 2026-03-04") as caught:
        trunk.check_peer(north.certificate, "north", "silo")
    assert "invite" in caught.value.remedy


@pytest.mark.parametrize("listed", [b"damaged", Authority().revocations({})])
def test_a_list_of_another_authority_is_refused(listed: bytes) -> None:
    trunk = OURS.issue("trunk")
    trunk = Identity("trunk", trunk.authority, trunk.certificate, trunk.key, listed)
    with pytest.raises(IdentityError, match="list of revoked certificates") as caught:
        trunk.check_peer(OURS.issue("north").certificate, "north", "silo")
    assert "revoked.pem" in caught.value.remedy


def test_added_silos_are_those_that_the_authority_signed() -> None:
    north = OURS.issue("north")
    assert not north.added
    for names in ([], ["late"], ["b", "a"]):
        assert dataclasses.replace(north, roster=OURS.roster(names)).added == set(names)


@pytest.mark.parametrize(
    "roster",
    [
        Authority().roster(["late"]),
        OURS.roster(["late"]).replace(b"late", b"evil"),
        OURS.roster(["a", "b"]).replace(b'"a", ', b""),
        b"{",
        b"[]",
        b'{"silos": ["late"], "signature": "zz"}',
        b'{"silos": 3, "signature": ""}',
    ],
)
def test_a_roster_that_the_authority_did_not_sign_adds_nobody(roster: bytes) -> None:
    with pytest.raises(IdentityError, match=r"roster\.json") as caught:
        _ = dataclasses.replace(OURS.issue("north"), roster=roster).added
    assert "delete" in caught.value.remedy
