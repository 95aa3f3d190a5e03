"""Certificates of the federation in a role that they are not for: nobody connects, serves or signs with one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from isthmus.errors import IdentityError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Authority, Identity, Role
from isthmus.wire.server import CLIENTS, Server
from isthmus.wire.sum_keys import sign_keys, verify_keys
from tests.unit.wire.test_identity import raw_server, refusal
from tests.unit.wire.test_server import Echo

AUTHORITY = Authority()
LIMIT = 1 << 20
ROLES: tuple[Role, ...] = get_args(Role)
CLIENT, SERVED = "a", {"Trunk": "trunk", "Root": "root"}


@pytest.fixture(params=SERVED)
def service(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(service: str) -> Iterator[Server]:
    """A server that expects one client of this name."""
    served = Server({service: Echo()}, AUTHORITY.issue(SERVED[service]), {service: [CLIENT]}, "localhost:0", LIMIT)
    served.start()
    yield served
    served.stop(0)


@pytest.mark.parametrize("role", ROLES)
def test_only_silos_connect_to_the_trunk_and_only_silos_and_edges_to_the_root(
    server: Server, service: str, role: Role
) -> None:
    """Whatever name the certificate has: that of one who may connect."""
    identity = AUTHORITY.issue(CLIENT, role)
    if role in CLIENTS[service]:
        channel = GrpcChannel(f"localhost:{server.port}", service, identity, deadline=5.0, limit=LIMIT)
        assert channel.call(pb.Ping()) == pb.Pong()
        channel.close()
    else:
        refused = refusal(server.port, identity, service=service)
        assert role not in ("silo", "edge") or f"that of the {role}, silo is needed" in str(refused)
    good = GrpcChannel(f"localhost:{server.port}", service, AUTHORITY.issue(CLIENT), deadline=5.0, limit=LIMIT)
    assert good.call(pb.Ping()) == pb.Pong()  # normal service goes on
    good.close()


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
