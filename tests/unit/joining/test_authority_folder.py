"""The authority's folder: who gets a certificate, and what is left of it after each change."""

from __future__ import annotations

import dataclasses
import stat
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from isthmus.errors import IdentityError, IsthmusError, RecipeError, RunError
from isthmus.joining import authority_folder
from isthmus.joining.authority_folder import AuthorityFolder
from isthmus.wire.authority import private_pem, signing_request
from isthmus.wire.identity import Identity, save_identity
from tests.integration.processes import write_recipe

DAY = 86_400.0


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.toml", trunk={"address": "a.example.org:7001"})


@pytest.fixture
def folder(tmp_path: Path, recipe: Path) -> AuthorityFolder:
    return AuthorityFolder.create(tmp_path / "authority", recipe)


def request() -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    return key, signing_request(key)


def enroll(folder: AuthorityFolder, name: str) -> Identity:
    key, asked = request()
    certificate = folder.enroll(folder.invite(name).id, asked)
    return Identity(name, folder.certificate, certificate, private_pem(key), folder.revoked)


def test_the_key_is_its_owners_alone(folder: AuthorityFolder) -> None:
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_a_second_authority_in_the_folder_is_refused(folder: AuthorityFolder, recipe: Path) -> None:
    before = folder.certificate
    with pytest.raises(RunError, match="holds an authority already"):
        AuthorityFolder.create(folder.path, recipe)
    assert AuthorityFolder(folder.path).certificate == before


@pytest.mark.parametrize("file", ["ca.pem", "key.pem", "settings.json"])
def test_a_folder_that_lacks_a_file_or_has_a_damaged_one(folder: AuthorityFolder, file: str) -> None:
    (folder.path / file).write_bytes(b"x")
    with pytest.raises((RunError, IdentityError)):
        AuthorityFolder(folder.path)
    (folder.path / file).unlink()
    with pytest.raises(RunError, match="isthmus authority init"):
        AuthorityFolder(folder.path)


@pytest.mark.parametrize(("name", "role"), [("north", "silo"), ("trunk", "trunk"), ("root", "root")])
def test_a_guest_gets_the_certificate_of_its_invite(folder: AuthorityFolder, name: str, role: str) -> None:
    invite = folder.invite(name)
    assert (invite.name, invite.role, invite.address, invite.server) == (name, role, "a.example.org:7001", "trunk")
    enroll(folder, name).check(role)  # type: ignore[arg-type]
    assert folder.role_of(name) == role


def test_an_edge_gets_an_edges(tmp_path: Path) -> None:
    edges = [{"name": "east", "address": "e.example.org:1", "silos": ["north", "south"]}]
    recipe = write_recipe(tmp_path / "recipe.toml", edge=edges)
    enroll(AuthorityFolder.create(tmp_path / "authority", recipe), "east").check("edge")


@pytest.mark.parametrize("name", ["west", "", "North", "authority"])
def test_nobody_else_is_invited(folder: AuthorityFolder, name: str) -> None:
    with pytest.raises(RecipeError, match="no party"):
        folder.invite(name)


def test_an_invite_works_once(folder: AuthorityFolder) -> None:
    invite, (_, asked) = folder.invite("north"), request()
    folder.enroll(invite.id, asked)
    for one in (asked, request()[1]):
        with pytest.raises(IdentityError, match="was used on"):
            folder.enroll(invite.id, one)


def test_of_many_at_once_one_uses_an_invite(folder: AuthorityFolder) -> None:
    invite, start = folder.invite("north"), Barrier(8)
    got: list[bytes] = []

    def enter() -> None:
        own = AuthorityFolder(folder.path)
        _, asked = request()
        start.wait()
        with suppress(IdentityError):
            got.append(own.enroll(invite.id, asked))

    threads = [Thread(target=enter) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(got) == 1
    assert [one.name for one in folder.certificates()] == ["north"]


def test_an_expired_invite_is_refused_by_day(folder: AuthorityFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    invite, now = folder.invite("north", days=2), authority_folder._now()
    monkeypatch.setattr(authority_folder, "_now", lambda: now + 2 * DAY + 5)
    with pytest.raises(IdentityError, match=f"expired on {invite.expires:%Y-%m-%d}") as caught:
        folder.enroll(invite.id, request()[1])
    assert "new invite" in caught.value.remedy


def test_a_newer_invite_withdraws_the_older(folder: AuthorityFolder) -> None:
    older, newer, other = folder.invite("north"), folder.invite("north"), folder.invite("south")
    with pytest.raises(IdentityError, match="withdrawn"):
        folder.enroll(older.id, request()[1])
    for one in (newer, other):
        folder.enroll(one.id, request()[1])


def test_a_lost_key_is_replaced_and_nobody_else_is_touched(folder: AuthorityFolder) -> None:
    lost, south = enroll(folder, "north"), enroll(folder, "south")
    found = enroll(folder, "north")
    judge = folder.issue("trunk")
    judge.check_peer(found.certificate, "north", "silo")
    judge.check_peer(south.certificate, "south", "silo")
    with pytest.raises(IdentityError, match="revoked on"):
        judge.check_peer(lost.certificate, "north", "silo")


def test_an_invite_that_is_not_used_revokes_nothing(folder: AuthorityFolder) -> None:
    north = enroll(folder, "north")
    folder.invite("north")
    folder.issue("trunk").check_peer(north.certificate, "north", "silo")


def test_renewed_is_the_same_party_with_another_key(folder: AuthorityFolder) -> None:
    first = enroll(folder, "north")
    key, asked = request()
    second = Identity("north", folder.certificate, folder.renew("north", asked), private_pem(key))
    second.check("silo")
    judge = folder.issue("trunk")
    for one in (first, second):  # connections with the first one go on until it ends
        judge.check_peer(one.certificate, "north", "silo")
    assert first.key != second.key


def test_a_revoked_party_neither_renews_nor_uses_what_it_was_sent(folder: AuthorityFolder) -> None:
    first, south = enroll(folder, "north"), enroll(folder, "south")
    renewed = folder.renew("north", request()[1])
    invite = folder.invite("north")
    assert folder.revoke("north") == 3
    judge = folder.issue("trunk")
    for certificate in (first.certificate, renewed):
        with pytest.raises(IdentityError, match="revoked on"):
            judge.check_peer(certificate, "north", "silo")
    with pytest.raises(IdentityError, match="no valid certificate"):
        folder.renew("north", request()[1])
    with pytest.raises(IdentityError, match="withdrawn"):
        folder.enroll(invite.id, request()[1])
    judge.check_peer(south.certificate, "south", "silo")
    enroll(folder, "north").check("silo")  # it may come back


@pytest.mark.parametrize("name", ["south", "nobody"])
def test_who_has_nothing_cannot_be_revoked(folder: AuthorityFolder, name: str) -> None:
    enroll(folder, "north")
    with pytest.raises(IdentityError, match="has no certificate") as caught:
        folder.revoke(name)
    assert "north" in caught.value.remedy


def test_a_party_that_left_the_recipe_keeps_what_it_has_and_is_not_invited(
    folder: AuthorityFolder, recipe: Path
) -> None:
    enroll(folder, "north")
    write_recipe(recipe, silo=[{"name": "south", "train": "south.jsonl"}])
    assert folder.role_of("north") == "silo"
    with pytest.raises(RecipeError):
        folder.invite("north")


def test_the_trunk_is_the_root_too_where_they_share_an_address(tmp_path: Path) -> None:
    for number, (root, names) in enumerate([("a:1", ["trunk", "root"]), ("b:1", ["trunk"])]):
        recipe = write_recipe(tmp_path / f"{number}.toml", trunk={"address": "a:1"}, root={"address": root})
        identity = AuthorityFolder.create(tmp_path / str(number), recipe).issue("trunk")
        save_identity(identity, tmp_path / f"c{number}")
        Identity.load(tmp_path / f"c{number}", "trunk", "trunk")
        read = x509.load_pem_x509_certificate(identity.certificate)
        found = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert found.get_values_for_type(x509.DNSName) == names


@pytest.mark.parametrize(("server", "address"), [("authority", None), ("trunk", "no address")])
def test_an_authority_that_cannot_be_reached_is_refused(
    server: str, address: str | None, recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(IsthmusError, match="address"):
        AuthorityFolder.create(tmp_path / "other", recipe, server=server, address=address)
    assert not (tmp_path / "other").exists()


def test_a_damaged_record_is_named(folder: AuthorityFolder) -> None:
    enroll(folder, "north")
    record = next((folder.path / "parties").iterdir())
    record.write_text("{")
    with pytest.raises(RunError, match=record.name):
        folder.certificates()


def test_silos_that_the_recipe_gets_later_are_the_added_ones(folder: AuthorityFolder, recipe: Path) -> None:
    assert folder.added() == frozenset()
    silos = [{"name": name, "train": f"{name}.jsonl"} for name in ("north", "south", "late")]
    write_recipe(recipe, silo=silos, train={"evaluate": False})
    assert folder.added() == AuthorityFolder(folder.path).added() == {"late"}
    late = enroll(folder, "late")
    assert dataclasses.replace(late, roster=folder.roster()).added == {"late"}


def test_added_silos_stay_while_the_recipe_cannot_be_read(folder: AuthorityFolder, recipe: Path) -> None:
    silos = [{"name": name, "train": f"{name}.jsonl"} for name in ("north", "south", "late")]
    write_recipe(recipe, silo=silos, train={"evaluate": False})
    assert folder.added() == {"late"}
    for text in ("[", "", 'seed = "x"'):
        recipe.write_text(text)
        assert folder.added() == {"late"}
    recipe.unlink()
    assert folder.added() == {"late"}
