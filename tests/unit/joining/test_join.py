"""Joining: from an invite to a folder that a silo runs from; interrupted anywhere, the same call goes on."""

from __future__ import annotations

import datetime
import json
import stat
import tomllib
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from isthmus.engines.roles import start_server
from isthmus.errors import DataError, DiskFullError, IdentityError, ModelError, PeerGoneError, RunError
from isthmus.joining import join as joining
from isthmus.joining.authority_folder import AuthorityFolder
from isthmus.joining.join import OwnFiles, fetch_model, join_federation, own_recipe
from isthmus.joining.keeper import CONTACT
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.recipe.shared import shared_keys
from isthmus.storage.record import RunDirectory
from isthmus.wire.identity import Identity, save_identity
from isthmus.wire.invite import Invite
from tests.integration.processes import free_port, rows_of, write_federation, write_rows


class Coordinator:
    """A trunk with the root and the authority, in this process."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        address = {"address": f"localhost:{free_port()}"}
        sections = {"trunk": address, "root": address, "wire": {"deadline": 5.0}} | sections
        self.recipe_path = write_federation(folder, **sections)
        self.authority = AuthorityFolder.create(folder / "authority", self.recipe_path)
        self.recipe = Recipe.read(self.recipe_path)
        save_identity(self.authority.issue("trunk"), Path(self.recipe.wire.certificates))
        self._run = RunDirectory.create(folder / "run", self.recipe)

    @contextmanager
    def serving(self) -> Iterator[None]:
        server, services = start_server(self.recipe, self._run, ("trunk", "root"), authority=self.authority)
        try:
            yield
        finally:
            server.stop(0)
            services["Trunk"].stop()  # type: ignore[attr-defined]


@pytest.fixture
def leader(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path / "leader")
    with made.serving():
        yield made


def rows(folder: Path) -> OwnFiles:
    folder.mkdir(parents=True, exist_ok=True)
    return OwnFiles((str(write_rows(folder / "own.jsonl", rows_of("own"))),))


def test_a_silo_has_all_that_it_needs_and_nothing_else(leader: Coordinator, tmp_path: Path) -> None:
    said: list[str] = []
    invite = Invite.parse(str(leader.authority.invite("north")))
    joined = join_federation(invite, tmp_path / "north", rows(tmp_path / "data"), said.append)
    recipe = Recipe.read(joined.recipe)
    assert recipe.model.path == str(tmp_path / "north" / "model")
    assert recipe.party("north").train == (str(tmp_path / "data" / "own.jsonl"),)
    assert recipe.party("north").held_out is None  # the leader's file is not here
    assert Checkpoint(recipe.model.path).fingerprint == Checkpoint(leader.recipe.model.path).fingerprint
    identity = Identity.load(Path(recipe.wire.certificates), "north", "silo")
    leader.authority.issue("trunk").check_peer(identity.certificate, "north", "silo")
    key = tmp_path / "north" / "certificates" / "north" / "key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_bytes() not in [one.read_bytes() for one in leader.recipe_path.parent.rglob("*") if one.is_file()]
    contact = json.loads((key.parent / CONTACT).read_text())
    assert contact == {"address": leader.recipe.trunk.address, "server": "trunk"}
    assert any(invite.fingerprint in line for line in said)
    assert any("fetching" in line for line in said)


def test_the_same_call_goes_on_where_it_stopped(
    leader: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invite, folder = leader.authority.invite("north"), tmp_path / "north"
    with monkeypatch.context() as patch:
        patch.setattr(joining, "fetch_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            join_federation(invite, folder, rows(tmp_path / "a"))
    assert not (folder / "model").exists()
    first = (folder / "certificates" / "north" / "key.pem").read_bytes()
    join_federation(invite, folder)
    weights = folder / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    (folder / "model" / "config.json").unlink()
    join_federation(invite, folder, rows(tmp_path / "b"))
    assert weights.read_bytes() == whole
    assert (folder / "certificates" / "north" / "key.pem").read_bytes() == first
    assert Recipe.read(folder / "recipe.toml").party("north").train == (str(tmp_path / "b" / "own.jsonl"),)


def test_files_that_are_here_are_not_fetched_again(leader: Coordinator, tmp_path: Path) -> None:
    joined = join_federation(leader.authority.invite("north"), tmp_path / "north")
    said: list[str] = []
    recipe = Recipe.read(joined.recipe)
    identity = Identity.load(Path(recipe.wire.certificates), "north", "silo")
    fetch_model(recipe, identity, joined.folder, said.append)
    assert not any("fetching" in line for line in said)


def test_a_used_invite_makes_no_second_folder(leader: Coordinator, tmp_path: Path) -> None:
    invite = leader.authority.invite("north")
    join_federation(invite, tmp_path / "one")
    with pytest.raises(IdentityError, match="was used on"):
        join_federation(invite, tmp_path / "two")
    assert not list((tmp_path / "two").iterdir())


def test_a_folder_of_another_party_or_federation_is_left_alone(leader: Coordinator, tmp_path: Path) -> None:
    join_federation(leader.authority.invite("north"), tmp_path / "north")
    with pytest.raises(RunError, match="is the folder of north"):
        join_federation(leader.authority.invite("south"), tmp_path / "north")
    other = AuthorityFolder.create(tmp_path / "other", leader.recipe_path)
    with pytest.raises(IdentityError, match="another federation"):
        join_federation(other.invite("north"), tmp_path / "north")


def test_an_invite_of_another_federation_is_told_apart(leader: Coordinator, tmp_path: Path) -> None:
    other = AuthorityFolder.create(tmp_path / "other", leader.recipe_path)
    with pytest.raises(IdentityError, match="not of the federation that the invite is from") as caught:
        join_federation(other.invite("north"), tmp_path / "north")
    assert "fingerprint" in caught.value.remedy


def shifted(days: float) -> Any:
    """The module ``datetime`` of a machine whose clock is ahead by so many days."""

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.now(tz) + datetime.timedelta(days=days)

    return types.SimpleNamespace(datetime=Shifted, timedelta=datetime.timedelta, UTC=datetime.UTC)


def test_a_leader_that_is_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = Coordinator(tmp_path / "leader")
    monkeypatch.setattr(joining, "JOIN_SECONDS", 0.5)
    with pytest.raises(PeerGoneError, match=away.recipe.trunk.address):
        join_federation(away.authority.invite("north"), tmp_path / "north")


@pytest.mark.parametrize("role", ["trunk", "root"])
def test_rows_are_a_silos(role: str, leader: Coordinator, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"is for the {role}"):
        join_federation(leader.authority.invite(role), tmp_path / role, rows(tmp_path / "data"))
    joined = join_federation(leader.authority.invite(role), tmp_path / role)
    assert sorted(path.name for path in joined.folder.iterdir()) == ["certificates", "recipe.toml"]


def test_a_file_that_is_not_there_is_named_before_the_invite_is_used(leader: Coordinator, tmp_path: Path) -> None:
    invite = leader.authority.invite("north")
    with pytest.raises(DataError, match=r"nothing\.csv"):
        join_federation(invite, tmp_path / "north", OwnFiles(("nothing.csv",)))
    join_federation(invite, tmp_path / "north")


def test_a_disk_that_is_too_full_is_named_with_both_sizes(
    leader: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = joining.shutil.disk_usage(tmp_path)
    invite = leader.authority.invite("north")
    with monkeypatch.context() as patch:
        patch.setattr(joining.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(DiskFullError, match=r"take \d+ MB, and 0 MB are free"):
            join_federation(invite, tmp_path / "north")
    join_federation(invite, tmp_path / "north")


def test_a_model_that_is_not_the_trunks_is_refused(leader: Coordinator, tmp_path: Path) -> None:
    joined = join_federation(leader.authority.invite("north"), tmp_path / "north")
    extra = joined.folder / "model" / "portion.json"
    read = json.loads(extra.read_text())
    read["digests"]["model.layers.1.mlp.up_proj.weight"] = "0" * 64
    recipe = Recipe.read(joined.recipe)
    identity = Identity.load(Path(recipe.wire.certificates), "north", "silo")
    extra.write_text(json.dumps(read))
    fetch_model(recipe, identity, joined.folder)  # mends it
    assert json.loads(extra.read_text()) != read


def test_a_damaged_piece_is_never_kept(leader: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_here", lambda path, file: False)
    with pytest.raises(ModelError, match="arrived damaged"):
        join_federation(leader.authority.invite("north"), tmp_path / "north")
    assert not [path for path in (tmp_path / "north" / "model").rglob("*") if path.is_file()]


def test_own_recipe_changes_nothing_that_all_must_have_alike() -> None:
    text = """
    seed = 9
    [model]
    path = "/leader/model"
    bottom = 1
    top = 1
    [wire]
    certificates = "/leader/certificates"
    [lora]
    start = "adapter"
    [[silo]]
    name = "north"
    train = "n.csv"
    format = "csv"
    held_out = "h.csv"
    [[silo]]
    name = "south"
    train = "s.jsonl"
    columns = { prompt = "note" }
    """
    before = tomllib.loads(text)
    for files in (OwnFiles(), OwnFiles(("a.jsonl",)), OwnFiles(("a.jsonl",), ("b.jsonl",))):
        after = tomllib.loads(own_recipe(text, "north", files))
        one, other = Recipe.of(before), Recipe.of(after)
        assert shared_keys(one) == shared_keys(other)
        assert other.model.path == "model"
        assert (other.wire.certificates, other.lora.start) == ("certificates", "start")
        assert other.party("south") == one.party("south")
        if files == OwnFiles():
            assert other.party("north") == one.party("north").model_copy(update={"format": None})
        else:
            assert other.party("north").format is None
            assert other.party("north").train == (str(Path("a.jsonl").resolve()),)
            assert (other.party("north").held_out is None) is (not files.held_out)


def test_what_a_party_wrote_into_its_copy_stays_when_its_rows_change(leader: Coordinator, tmp_path: Path) -> None:
    invite = leader.authority.invite("north")
    joined = join_federation(invite, tmp_path / "north", rows(tmp_path / "a"))
    values = tomllib.loads(joined.recipe.read_text())
    values["threads"], values["silo"][0]["device"] = 2, "auto"
    joined.recipe.write_text(tomli_w.dumps(values))
    join_federation(invite, tmp_path / "north", rows(tmp_path / "b"))
    recipe = Recipe.read(joined.recipe)
    assert (recipe.threads, recipe.party("north").device) == (2, "auto")
    assert recipe.party("north").train == (str(tmp_path / "b" / "own.jsonl"),)


def test_a_folder_with_a_key_has_all_else(leader: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed just before the key is written, the party asks for another invite, and the same folder is good for it."""
    with monkeypatch.context() as patch:
        patch.setattr(joining, "save_identity", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            join_federation(leader.authority.invite("north"), tmp_path / "north")
    place = tmp_path / "north" / "certificates" / "north"
    assert (tmp_path / "north" / "recipe.toml").exists()
    assert [path.name for path in place.iterdir()] == [CONTACT]
    join_federation(leader.authority.invite("north"), tmp_path / "north")
