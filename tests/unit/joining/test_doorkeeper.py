"""The authority as a service, over real sockets: what guests and parties may ask, and what they are told."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from isthmus.errors import IdentityError, IsthmusError, PeerGoneError, ProtocolError
from isthmus.joining import authority_folder
from isthmus.joining.authority_folder import AuthorityFolder
from isthmus.joining.doorkeeper import AuthorityService
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import private_pem, signed_certificate, signing_request, x509_name
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity
from isthmus.wire.invite import GUEST, Invite
from isthmus.wire.server import Server
from tests.conformance.test_channels import Echo
from tests.integration.processes import write_recipe

HANG = 20.0


@pytest.fixture
def folder(tmp_path: Path) -> AuthorityFolder:
    return AuthorityFolder.create(tmp_path / "authority", write_recipe(tmp_path / "recipe.toml"))


@pytest.fixture
def server(folder: AuthorityFolder) -> Iterator[Server]:
    with serving(folder) as made:
        yield made


@contextmanager
def serving(folder: AuthorityFolder) -> Iterator[Server]:
    service = AuthorityService(folder)
    peers = {"Trunk": ["north", "south"]}
    made = Server({"Trunk": Echo()}, folder.issue("trunk"), peers, "localhost:0", 2**20, doorkeeper=service)
    made.start()
    yield made
    made.stop(0)


def connected(server: Server, identity: Identity, service: str = "Authority") -> GrpcChannel:
    return GrpcChannel(f"localhost:{server.port}", service, identity, server="trunk", deadline=HANG)


def ask(server: Server, identity: Identity, request: Any, service: str = "Authority") -> Any:
    with closing(connected(server, identity, service)) as channel:
        return channel.submit(request).result(HANG)


def enroll(server: Server, invite: Invite) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    answer = ask(server, invite.guest(), pb.Enroll(request=signing_request(key)))
    return Identity(invite.name, answer.authority, answer.certificate, private_pem(key))


def test_a_guest_becomes_a_party_while_the_server_runs(server: Server, folder: AuthorityFolder) -> None:
    north = enroll(server, folder.invite("north"))
    north.check("silo")
    assert ask(server, north, pb.Ping(), "Trunk") == pb.Pong()


def test_the_recipe_comes_as_it_is_written(server: Server, folder: AuthorityFolder) -> None:
    invite, key = folder.invite("north"), ec.generate_private_key(ec.SECP256R1())
    folder.recipe_path.write_text("# ours\n" + folder.recipe_path.read_text())
    answer = ask(server, invite.guest(), pb.Enroll(request=signing_request(key)))
    assert answer.recipe == folder.recipe_path.read_text()


def refused(server: Server, identity: Identity, service: str = "Authority") -> IsthmusError:
    with pytest.raises((IdentityError, PeerGoneError, ProtocolError)) as caught:
        GrpcChannel(f"localhost:{server.port}", service, identity, server="trunk", deadline=0.5)
    return caught.value


def test_an_invite_that_is_over_says_why(
    server: Server, folder: AuthorityFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, withdrawn, expired = folder.invite("north"), folder.invite("south"), folder.invite("root")
    enroll(server, used)
    folder.invite("south")
    assert "was used on" in refused(server, used.guest()).message
    assert "was withdrawn on" in refused(server, withdrawn.guest()).message
    later = authority_folder._now() + 8 * 86_400
    monkeypatch.setattr(authority_folder, "_now", lambda: later)
    error = refused(server, expired.guest())
    assert "expired on" in error.message
    assert "new invite" in error.remedy


def test_an_invite_of_another_federation_is_not_heard(server: Server, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = AuthorityFolder.create(tmp_path / "other" / "a", write_recipe(tmp_path / "other" / "recipe.toml"))
    error = refused(server, other.invite("north").guest())
    assert isinstance(error, IdentityError)
    assert "no trusted connection" in error.message


def test_a_guest_reaches_the_authority_alone(server: Server, folder: AuthorityFolder) -> None:
    guest = folder.invite("north").guest()
    error = refused(server, guest, "Trunk")
    assert isinstance(error, IdentityError)
    for request in (pb.Withdrawals(), pb.Hello(version=frames.VERSION, instance="i")):
        with pytest.raises(ProtocolError, match="requests of guests"):
            ask(server, guest, request)


def forged(invite: Invite, name: str, unit: str) -> Identity:
    """What the holder of an invite can sign with its secret."""
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    issuer = x509.load_pem_x509_certificate(invite.anchor).subject
    made = signed_certificate(x509_name(name, unit), issuer, key.public_key(), invite._key, days=9, usages=usages)
    guest = invite.guest()
    return Identity(name, guest.authority, made.public_bytes(serialization.Encoding.PEM), private_pem(key))


@pytest.mark.parametrize("unit", ["silo", "trunk", "root", "edge", GUEST])
@pytest.mark.parametrize("service", ["Trunk", "Authority"])
def test_what_a_guest_signs_by_itself_is_nobody(
    unit: str, service: str, server: Server, folder: AuthorityFolder
) -> None:
    """The secret of an invite makes no party, and not another invite's guest."""
    victim = folder.invite("south")
    enroll(server, folder.invite("root"))
    invite = folder.invite("north")
    for name in ("south", "root", "trunk", victim.id):
        error = refused(server, forged(invite, name, unit), service)
        assert isinstance(error, IdentityError), (name, error)
    assert {one.name for one in folder.certificates()} == {"trunk", "root"}
    enroll(server, victim).check("silo")


def test_a_silo_learns_who_is_revoked(server: Server, folder: AuthorityFolder) -> None:
    north, south = enroll(server, folder.invite("north")), enroll(server, folder.invite("south"))
    folder.revoke("south")
    listed = ask(server, north, pb.Withdrawals()).revoked
    knowing = dataclasses.replace(north, revoked=listed)
    with pytest.raises(IdentityError, match="revoked on"):
        knowing.verify("south", south.certificate, south.sign(b"d"), b"d")


def test_who_is_revoked_asks_for_nothing_more(server: Server, folder: AuthorityFolder) -> None:
    north = enroll(server, folder.invite("north"))
    folder.revoke("north")
    error = refused(server, north)
    assert isinstance(error, IdentityError)
    assert "no valid certificate" in error.message


def test_a_party_renews_with_another_key(server: Server, folder: AuthorityFolder) -> None:
    north, key = enroll(server, folder.invite("north")), ec.generate_private_key(ec.SECP256R1())
    answer = ask(server, north, pb.Enroll(request=signing_request(key)))
    renewed = Identity("north", answer.authority, answer.certificate, private_pem(key))
    renewed.check("silo")
    assert ask(server, renewed, pb.Ping(), "Trunk") == pb.Pong()


def test_a_damaged_request_leaves_the_invite_open(server: Server, folder: AuthorityFolder) -> None:
    invite = folder.invite("north")
    with pytest.raises(IdentityError, match="signing request"):
        ask(server, invite.guest(), pb.Enroll(request=b"x"))
    enroll(server, invite).check("silo")


def test_an_invite_is_for_days_and_a_certificate_for_months(folder: AuthorityFolder, server: Server) -> None:
    invite = folder.invite("north")
    left = enroll(server, invite).ends - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=89) < left < datetime.timedelta(days=91)
    assert invite.expires - datetime.datetime.now(datetime.UTC) < datetime.timedelta(days=8)


def test_a_silo_that_was_added_gets_its_files_now_and_takes_part_soon(folder: AuthorityFolder, tmp_path: Path) -> None:
    peers = {"Trunk": ["north", "south"], "Model": ["north", "south"]}
    services = {"Trunk": Echo(), "Model": Echo()}
    made = Server(services, folder.issue("trunk"), peers, "localhost:0", 2**20, doorkeeper=AuthorityService(folder))
    made.start()
    silos = [{"name": name, "train": f"{name}.jsonl"} for name in ("north", "south", "late")]
    write_recipe(folder.recipe_path, silo=silos, train={"evaluate": False})
    late = enroll(made, folder.invite("late"))
    assert ask(made, late, pb.Ping(), "Model") == pb.Pong()
    error = refused(made, late, "Trunk")
    assert isinstance(error, PeerGoneError)  # it tries again, as for a server that is away
    assert "takes part after the round" in error.message
    assert isinstance(refused(made, enroll(made, folder.invite("root")), "Model"), IdentityError)
    made.stop(0)
