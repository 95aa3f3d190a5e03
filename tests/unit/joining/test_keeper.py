"""Certificates that are kept fresh, and open connections that go on with the new one or end with the old."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from isthmus.errors import IdentityError
from isthmus.joining import keeper
from isthmus.joining.authority_folder import AuthorityFolder
from isthmus.joining.doorkeeper import AuthorityService
from isthmus.joining.keeper import CONTACT, CertificateKeeper, FolderSource, NetworkSource, kept_certificate
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import CLOCK_SLACK, private_pem
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import CERTIFICATE, KEY, NEXT_KEY, Identity, replace_certificate, save_identity
from isthmus.wire.server import Server
from tests.conformance.test_channels import Echo, ask, number
from tests.integration.processes import write_recipe

HANG = 30.0


class Federation:
    """An authority, a trunk that answers from it, and the parties' folders."""

    def __init__(self, folder: Path, **settings: float) -> None:
        recipe = write_recipe(folder / "recipe.toml")
        self.authority = AuthorityFolder.create(folder / "authority", recipe, **settings)  # type: ignore[arg-type]
        self.certificates = folder / "certificates"
        for name in ("trunk", "north", "south"):
            save_identity(self.authority.issue(name), self.certificates)
        self.echo = Echo()
        trunk = Identity.load(self.certificates, "trunk", "trunk")
        service = AuthorityService(self.authority)
        peers = {"Trunk": ["north", "south"]}
        self.server = Server({"Trunk": self.echo}, trunk, peers, "localhost:0", 2**20, doorkeeper=service)
        self.server.start()

    def channel(self, name: str) -> GrpcChannel:
        identity = Identity.load(self.certificates, name, "silo")
        return GrpcChannel(f"localhost:{self.server.port}", "Trunk", identity, deadline=2.0)

    def keeper(self, name: str) -> CertificateKeeper:
        return CertificateKeeper(self.certificates, name, FolderSource(self.authority, name))

    def serial(self, name: str) -> int:
        return x509.load_pem_x509_certificate((self.certificates / name / CERTIFICATE).read_bytes()).serial_number


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.server.stop(0)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("left", "renewed"), [(0.9, False), (0.34, False), (0.32, True), (0.01, True)])
def test_a_certificate_is_renewed_when_a_third_of_its_life_is_left(
    left: float, renewed: bool, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = x509.load_pem_x509_certificate((federation.certificates / "north" / CERTIFICATE).read_bytes())
    life = read.not_valid_after_utc - read.not_valid_before_utc - CLOCK_SLACK
    now = read.not_valid_after_utc - left * life

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return now

    before, key = federation.serial("north"), (federation.certificates / "north" / KEY).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(keeper.datetime, "datetime", Then)
        assert federation.keeper("north").due() is renewed
    if renewed:
        monkeypatch.setattr(CertificateKeeper, "due", lambda self: True)
    federation.keeper("north").look()
    assert (federation.serial("north") != before) is renewed
    assert ((federation.certificates / "north" / KEY).read_bytes() != key) is renewed
    Identity.load(federation.certificates, "north", "silo")


def test_open_connections_go_on_with_the_new_certificate(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of client and server alike, and no request is lost or answered twice."""
    with closing(federation.channel("north")) as north, closing(federation.channel("south")) as south:
        assert ask(north, number(1)) == number(1)
        stop, sent = threading.Event(), [1]

        def talk() -> None:
            while not stop.is_set():
                sent.append(sent[-1] + 1)
                assert ask(north, number(sent[-1])) == number(sent[-1])

        talking = threading.Thread(target=talk)
        talking.start()
        monkeypatch.setattr(CertificateKeeper, "due", lambda self: True)
        before = federation.serial("north")
        for name in ("north", "trunk"):
            federation.keeper(name).look()
        until(lambda: x509.load_pem_x509_certificate(north._identity.certificate).serial_number != before)
        for _ in range(20):
            assert ask(south, number(0)) == number(0)
        with closing(federation.channel("south")) as late:  # sees the trunk's new one
            assert ask(late, number(0)) == number(0)
        stop.set()
        talking.join(HANG)
    seen = [one.completed for one in federation.echo.requests if isinstance(one, pb.Adapters) and one.completed]
    assert seen == sent


def talk_on(channel: GrpcChannel) -> None:
    for count in range(3000):
        ask(channel, number(count))
        time.sleep(0.01)


@pytest.mark.parametrize("known", ["folder", "network"])
def test_a_revoked_party_is_cut_off_at_once_and_nobody_else(known: str, federation: Federation) -> None:
    with closing(federation.channel("north")) as north, closing(federation.channel("south")) as south:
        assert ask(north, number(1)) == number(1)
        federation.authority.revoke("north")
        if known == "folder":
            federation.keeper("trunk").look()
        else:
            contact = f'{{"address": "localhost:{federation.server.port}", "server": "trunk"}}'
            (federation.certificates / "trunk" / CONTACT).write_text(contact)
            source = NetworkSource(federation.certificates, "trunk", "trunk")
            CertificateKeeper(federation.certificates, "trunk", source).look()
        pending = north.submit(number(2))
        until(lambda: north._ended is not None or pending.done())
        with pytest.raises(IdentityError, match="revoked on") as caught:
            talk_on(north)
        assert "new invite" in caught.value.remedy
        assert ask(south, number(3)) == number(3)
        with pytest.raises(IdentityError, match="revoked on"):
            federation.channel("north")


def test_an_open_connection_ends_when_its_certificate_does(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    short = federation.authority._authority.issue("north", days=4 / 86_400)
    save_identity(short, federation.certificates)
    with closing(federation.channel("north")) as north, pytest.raises(IdentityError, match="expired"):
        talk_on(north)
    federation.server.stop(0)


def test_a_folder_holds_a_pair_at_every_moment_of_a_replacement(federation: Federation) -> None:
    """A process that is killed within it leaves what the next one can load."""
    place = federation.certificates / "north"
    old = Identity.load(federation.certificates, "north", "silo")
    new = federation.authority.issue("north")
    (place / NEXT_KEY).touch(mode=0o600)
    (place / NEXT_KEY).write_bytes(new.key)
    assert Identity.load(federation.certificates, "north", "silo").key == old.key
    (place / CERTIFICATE).write_bytes(new.certificate)
    assert Identity.load(federation.certificates, "north", "silo").key == new.key
    (place / NEXT_KEY).replace(place / KEY)
    assert Identity.load(federation.certificates, "north", "silo") == new
    (place / NEXT_KEY).write_bytes(b"half")
    assert Identity.load(federation.certificates, "north", "silo") == new
    replace_certificate(place, old.certificate, old.key)
    assert Identity.load(federation.certificates, "north", "silo").key == old.key
    assert sorted(one.name for one in place.iterdir()) == ["ca.pem", "cert.pem", "key.pem", "revoked.pem"]


def test_a_new_certificate_that_is_not_valid_is_not_used(federation: Federation) -> None:
    identity = Identity.load(federation.certificates, "north", "silo")
    assert identity.renewed() is identity
    key = private_pem(ec.generate_private_key(ec.SECP256R1()))
    replace_certificate(federation.certificates / "north", b"damaged", key)
    assert identity.renewed() is identity
    renewed = federation.authority.issue("north")
    replace_certificate(federation.certificates / "north", renewed.certificate, renewed.key)
    assert identity.renewed() == renewed


def test_a_server_where_the_authority_is_makes_its_own_key(federation: Federation, tmp_path: Path) -> None:
    with kept_certificate(tmp_path / "own", "trunk", "trunk", federation.authority):
        first = Identity.load(tmp_path / "own", "trunk", "trunk")
    with kept_certificate(tmp_path / "own", "trunk", "trunk", federation.authority):
        assert Identity.load(tmp_path / "own", "trunk", "trunk").key == first.key


def test_without_an_authority_nothing_is_kept(federation: Federation) -> None:
    before = {*threading.enumerate()}
    with kept_certificate(federation.certificates, "north", "silo"):
        assert {*threading.enumerate()} <= before  # others' threads may end


def test_an_authority_that_is_away_is_waited_for(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "REACH_SECONDS", 0.3)
    monkeypatch.setattr(NetworkSource, "seconds", 0.05, raising=False)
    monkeypatch.setattr(CertificateKeeper, "due", lambda self: True)
    contact = federation.certificates / "north" / CONTACT
    contact.write_text('{"address": "localhost:1", "server": "trunk"}')
    before = federation.serial("north")
    with kept_certificate(federation.certificates, "north", "silo"):
        assert federation.serial("north") == before
        contact.write_text(f'{{"address": "localhost:{federation.server.port}", "server": "trunk"}}')
        until(lambda: federation.serial("north") != before)


def test_damaged_contacts_do_not_end_a_role(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("{", "{}", "[]"):
        (federation.certificates / "north" / CONTACT).write_text(text)
        with kept_certificate(federation.certificates, "north", "silo"):
            pass


def test_what_is_kept_is_written_only_when_it_changes(federation: Federation) -> None:
    """Else every look would be a new identity, for servers and silos alike."""
    place = federation.certificates / "north"
    federation.keeper("north").look()
    identity = Identity.load(federation.certificates, "north", "silo")
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in place.iterdir()}
    again = CertificateKeeper(
        federation.certificates, "north", FolderSource(AuthorityFolder(federation.authority.path), "north")
    )
    for one in (federation.keeper("north"), again):
        one.look()
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in place.iterdir()} == before
    assert identity.renewed() is identity


def test_a_recipe_that_is_half_written_holds_up_no_revocation(federation: Federation) -> None:
    recipe = federation.authority.recipe_path
    text = recipe.read_text()
    recipe.write_text(text[: len(text) // 2])
    federation.authority.revoke("south")
    federation.keeper("north").look()
    south = Identity.load(federation.certificates, "south", "silo")
    with pytest.raises(IdentityError, match="revoked on"):
        Identity.load(federation.certificates, "north", "silo").check_peer(south.certificate, "south", "silo")
