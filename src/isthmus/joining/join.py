"""Joining a federation: from an invite to a folder with a key, a certificate, the recipe and the silo's own parts."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import tomllib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec

from isthmus.errors import DataError, DiskFullError, IdentityError, ModelError, RunError
from isthmus.joining.keeper import CONTACT
from isthmus.joining.model_files import MODEL, START
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.portion import FILE_KINDS
from isthmus.recipe import Recipe
from isthmus.recipe.shared import OWN_PLACES
from isthmus.storage.files import disk_errors, private_folder, writing
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import private_pem, signing_request
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import KEY, Identity, save_identity
from isthmus.wire.invite import Invite, key_of

RECIPE, CERTIFICATES = "recipe.toml", "certificates"
SPARE = 64 * 2**20
"""Bytes of the disk that stay free."""
_BY_CLOCK = ("certificate has expired", "certificate is not yet valid")
"""What TLS says of a server's certificate where a clock is wrong."""
JOIN_SECONDS = 60.0
"""Seconds to reach the server that answers guests."""
Notify = Callable[[str], None]
_TELL = "tell who leads the federation: someone may stand between you and them"


@dataclass(frozen=True)
class OwnFiles:
    """Where a silo's own rows are."""

    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Joined:
    """A party's folder."""

    invite: Invite
    folder: Path

    @property
    def recipe(self) -> Path:
        """The recipe's file."""
        return self.folder / RECIPE


def join_federation(
    invite: Invite, folder: Path, files: OwnFiles | None = None, notify: Notify = lambda message: None
) -> Joined:
    """Become a party. The same call goes on where it was interrupted.

    Args:
        folder: the party's own; it is made.
        files: a silo's rows; None: as the recipe says.
        notify: called with messages about what is done.

    Raises:
        IdentityError: the invite is used, expired, withdrawn or of another federation; or the folder is another
            party's.
        DataError: rows of a party that is no silo, or a file that is not there.
        PeerGoneError: the server cannot be reached.
        DiskFullError: the silo's parts of the model do not fit on the disk.
        ModelError: a file arrived damaged.
    """
    files = files or OwnFiles()
    _check_files(invite, files)
    certificates = folder / CERTIFICATES
    private_folder(folder)
    identity = _own_identity(invite, certificates)
    if identity is None:
        identity, recipe = _enroll(invite, notify)
        with disk_errors(folder):
            _write(folder / RECIPE, own_recipe(recipe, invite.name, files))
            _write(certificates / invite.name / CONTACT, json.dumps(_contact(invite)))
            save_identity(identity, certificates)  # last: a folder with a key has all of it
        for key in _own_code(recipe):
            notify(f"left out of the recipe: {key}; what is used on your text, you write into {folder / RECIPE}")
        identity.check(invite.role)  # if the clock is wrong, the same call goes on when it is right
        notify(f"certificate of {invite.name} ({invite.role}): {certificates / invite.name}")
    elif files != OwnFiles():
        _write(folder / RECIPE, with_rows((folder / RECIPE).read_text(encoding="utf-8"), invite.name, files))
    if invite.role == "silo":
        fetch_model(Recipe.read(folder / RECIPE, undecided=True), identity, folder, notify)
    return Joined(invite, folder)


def own_recipe(text: str, name: str, files: OwnFiles) -> str:
    """The federation's recipe with what is this party's own: places on its machine, and its own rows.

    What the text says of any party's machine is left out (``recipe.shared.OWN_PLACES``): who leads the federation must
    not name files that are read here, or code that is run.

    Args:
        text: TOML, as who leads the federation wrote it.
        name: the party's.
    """
    values: dict[str, Any] = tomllib.loads(text)
    for key in OWN_PLACES:
        table, _, leaf = key.rpartition(".")
        found = values.get(table, {}) if table else values
        if isinstance(found, dict) and leaf not in ("train", "held_out"):
            found.pop(leaf, None)
    values.setdefault("model", {})["path"] = MODEL
    values.setdefault("wire", {})["certificates"] = CERTIFICATES
    if values.get("lora", {}).get("start") is not None:
        values["lora"]["start"] = START
    values["silo"] = [_without_places(silo) for silo in values.get("silo", [])]
    return with_rows(tomli_w.dumps(values), name, files)


def with_rows(text: str, name: str, files: OwnFiles) -> str:
    """A party's copy of the recipe with these rows of its own; what else it has written there stays.

    Args:
        text: TOML.
        name: the party's.
    """
    values: dict[str, Any] = tomllib.loads(text)
    for silo in values.get("silo", []):
        if silo.get("name") == name and files.train:  # format and measured rows are those of other files
            for key in ("format", "held_out"):
                silo.pop(key, None)
            silo["train"] = _resolved(files.train)
        if silo.get("name") == name and files.held_out:
            silo["held_out"] = _resolved(files.held_out)
    if not any("held_out" in silo for silo in values.get("silo", [])):
        values.get("train", {}).pop("evaluate", None)  # there is nothing to measure on here
    head = f"# {name}'s copy. Keys that all parties must have alike are compared when they connect.\n"
    return head + tomli_w.dumps(values)


def _own_code(text: str) -> list[str]:
    """Keys of a recipe that say which code or lists a silo uses on its text."""
    section = tomllib.loads(text).get("sensitivity", {})
    return [f"sensitivity.{key}" for key in ("function", "names") if key in section]


def _without_places(silo: dict[str, Any]) -> dict[str, Any]:
    """A silo's table without what is about its machine; of its files, their mere names."""
    kept = {key: value for key, value in silo.items() if f"silo.{key}" not in OWN_PLACES}
    for key in ("train", "held_out"):
        if key in silo:
            listed = silo[key] if isinstance(silo[key], list) else [silo[key]]
            kept[key] = [Path(str(one)).name for one in listed]
    return kept


def _resolved(paths: tuple[str, ...]) -> list[str]:
    return [str(Path(path).resolve()) for path in paths]


def fetch_model(recipe: Recipe, identity: Identity, folder: Path, notify: Notify = lambda message: None) -> None:
    """Fetch the files of the silo's own parts of the model. Those that are there already are not fetched again.

    Args:
        recipe: the silo's own copy.
        folder: the party's.

    Raises:
        PeerGoneError, DiskFullError, ModelError: as ``join_federation``.
    """
    channel = GrpcChannel(
        recipe.trunk.address,
        "Model",
        identity,
        server="trunk",
        visits=True,
        deadline=recipe.waits.reach,
        answer_deadline=recipe.waits.answer,
        limit=recipe.wire.max_frame_bytes,
    )
    with closing(channel):
        listed: pb.Listed = channel.call(pb.Listing())
        for file in listed.files:
            _check_place(file.name)
        missing = [file for file in listed.files if not _here(folder / file.name, file)]
        size = sum(file.size for file in missing)
        _require_disk(folder, size)
        if missing:
            notify(f"fetching {size / 1e6:,.1f} MB: the parts of the model that stay at {identity.name}")
        for file in missing:
            _fetch(channel, file, folder)
    if Checkpoint(str(folder / MODEL)).fingerprint != listed.fingerprint:
        raise ModelError(
            f"the model in {folder / MODEL} is not the trunk's", remedy=f"delete {folder / MODEL} and join again"
        )
    notify(f"model: {folder / MODEL}, fingerprint {listed.fingerprint[:16]}, the trunk's")


def _own_identity(invite: Invite, certificates: Path) -> Identity | None:
    """The identity that an earlier call got; None: there is none.

    Raises:
        IdentityError: it is of another federation, or not valid.
    """
    if not (certificates / invite.name / KEY).exists():
        found = certificates.iterdir() if certificates.is_dir() else ()
        others = sorted(path.name for path in found if path.name != invite.name)
        if others:
            raise RunError(
                f"{certificates.parent} is the folder of {others[0]}", remedy="name another one with --folder"
            )
        return None
    identity = Identity.load(certificates, invite.name, invite.role)
    if key_of(identity.authority) != invite.authority:
        raise IdentityError(
            f"{certificates.parent} is of another federation than the invite",
            remedy="name another folder with --folder",
        )
    return identity


def _enroll(invite: Invite, notify: Notify) -> tuple[Identity, str]:
    """A new key's identity, and the recipe's text."""
    key = ec.generate_private_key(ec.SECP256R1())
    notify(f"asking {invite.server} at {invite.address}; the authority's fingerprint must be {invite.fingerprint}")
    try:
        channel = GrpcChannel(invite.address, "Authority", invite.guest(), server=invite.server, deadline=JOIN_SECONDS)
    except IdentityError as error:
        if any(word in error.message for word in _BY_CLOCK):
            now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
            raise IdentityError(
                f"by this machine's clock, {now}, the certificate of the server at {invite.address} is not valid",
                remedy="set the clock right and join again, with the same invite; else ask who leads the federation",
            ) from error
        if "no trusted connection" in error.message:
            raise IdentityError(
                f"the server at {invite.address} is not of the federation that the invite is from, or does not know "
                "the invite",
                remedy="ask who leads the federation for a new invite; if the fingerprint is not theirs, for nothing",
            ) from error
        raise
    with closing(channel):
        answer: pb.Enrolled = channel.call(pb.Enroll(request=signing_request(key)))
    if key_of(answer.authority) != invite.authority:
        raise IdentityError("the certificate that came is of another authority than the invite", remedy=_TELL)
    return Identity(invite.name, answer.authority, answer.certificate, private_pem(key), answer.revoked), answer.recipe


def _contact(invite: Invite) -> dict[str, str]:
    return {"address": invite.address, "server": invite.server}


def _check_files(invite: Invite, files: OwnFiles) -> None:
    if invite.role != "silo" and files != OwnFiles():
        raise DataError(
            f"this invite is for the {invite.role} {invite.name}; rows are a silo's", remedy="leave them out"
        )
    for path in (*files.train, *files.held_out):
        if "*" not in path and ":" not in path and not Path(path).exists():
            raise DataError(f"there is no file {path}", remedy="correct the path of --train or --held-out")


def _require_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + SPARE:
        raise DiskFullError(
            f"the parts of the model take {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free at {folder}",
            remedy="free some space, or name another folder with --folder; then join again",
        )


def _check_place(name: str) -> None:
    """Refuse a file that is none of a model: the server names them, and a key or a recipe is not its to write."""
    place = Path(name)
    if (
        place.parts[0] not in (MODEL, START)
        or len(place.parts) != 2
        or place.suffix not in (*FILE_KINDS, ".safetensors")
    ):
        raise ModelError(
            f"the trunk sends {name!r}, which is no file of a model",
            remedy="leave this federation, or ask who leads it what that is",
        )


def _here(path: Path, file: pb.File) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == file.digest


def _fetch(channel: GrpcChannel, file: pb.File, folder: Path) -> None:
    """One file, whole or not at all."""
    with writing(folder / file.name) as temporary:
        with temporary.open("wb") as out:
            while out.tell() < file.size:
                piece: pb.Fetched = channel.call(pb.Fetch(name=file.name, offset=out.tell()))
                if not piece.data:
                    break
                out.write(piece.data)
        if not _here(temporary, file):
            raise ModelError(f"{file.name} arrived damaged", remedy="join again; it is fetched anew")


def _write(path: Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
