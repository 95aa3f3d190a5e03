"""Certificates of the federation in a role that they are not for: nobody connects, serves or signs with one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import get_args

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from isthmus.errors import IdentityError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity, Role
from isthmus.wire.server import Server
from isthmus.wire.sum_keys import sign_keys, verify_keys
from tests.unit.wire.test_identity import raw_server, refusal
from tests.unit.wire.test_server import Echo

AUTHORITY = Authority()
LIMIT = 1 << 20
ROLES: tuple[Role, ...] = get_args(Role)
CLIENT, EDGE, SERVED = "a", "e", {"Trunk": "trunk", "Root": "root"}


@pytest.fixture(params=SERVED)
def service(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(service: str) -> Iterator[Server]:
    """A server that expects a silo, and if it is a root an edge, by these names."""
    peers = {service: [CLIENT, EDGE] if service == "Root" else [CLIENT]}
    served = Server({service: Echo()}, AUTHORITY.issue(SERVED[service]), peers, "localhost:0", LIMIT, edges=[EDGE])
    served.start()
    yield served
    served.stop(0)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", [CLIENT, EDGE])
def test_who_connects_has_the_name_and_the_role_that_the_recipe_gives_it(
    server: Server, service: str, name: str, role: Role
) -> None:
    identity, expected = AUTHORITY.issue(name, role), "edge" if name == EDGE else "silo"
    if role == expected and (name == CLIENT or service == "Root"):
        assert ping(server, service, identity) == pb.Pong()
    else:
        refused = refusal(server.port, identity, service=service)
        if role in ("silo", "edge") and role != expected and (name == CLIENT or service == "Root"):
            assert f"that of the {role}, {expected} is needed" in str(refused)
    assert ping(server, service, AUTHORITY.issue(CLIENT)) == pb.Pong()  # normal service goes on


def ping(server: Server, service: str, identity: Identity) -> object:
    channel = GrpcChannel(f"localhost:{server.port}", service, identity, deadline=5.0, limit=LIMIT)
    with closing(channel):
        return channel.call(pb.Ping())


def test_a_silos_certificate_serves_nothing_even_under_the_trunks_name() -> None:
    heard: list[bytes] = []

    def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        heard.extend(requests)
        yield frames.wrap(pb.Pong()).SerializeToString()

    with raw_server(stream, AUTHORITY.issue("trunk", "silo")) as port:
        refusal(port, AUTHORITY.issue(CLIENT))
    assert not heard


@pytest.mark.parametrize("role", ROLES)
def test_of_silos_alone_a_signature_counts(role: Role) -> None:
    """Else a root could add keys of its own to a masked sum under the name of a silo that it made up."""
    reader, signer = AUTHORITY.issue("b"), AUTHORITY.issue(CLIENT, role)
    keys = sign_keys(signer, sealing=bytes(32), masking=bytes(32), commitment=bytes(32))
    if role == "silo":
        verify_keys(reader, CLIENT, keys)
    else:
        with pytest.raises(IdentityError, match=f"that of the {role}, silo is needed"):
            verify_keys(reader, CLIENT, keys)


def test_a_certificate_without_a_role_is_refused_by_name() -> None:
    """As an authority that does not know of roles makes them."""
    identity = AUTHORITY.issue(CLIENT)
    plain = without_role(identity)
    for role in ROLES:
        with pytest.raises(IdentityError, match="one without a role") as refused:
            plain.check(role)
        assert "isthmus certificates" in refused.value.remedy


def without_role(identity: Identity) -> Identity:
    old = x509.load_pem_x509_certificate(identity.certificate)
    name = x509.Name([one for one in old.subject if one.oid != x509.NameOID.ORGANIZATIONAL_UNIT_NAME])
    builder = x509.CertificateBuilder(old.issuer, name, old.public_key(), old.serial_number)
    builder = builder.not_valid_before(old.not_valid_before_utc).not_valid_after(old.not_valid_after_utc)
    signed = builder.sign(AUTHORITY._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return Identity(identity.name, identity.authority, signed, identity.key)
