"""The folder of a federation's authority: its key, the invites, and the certificates that it has issued.

One process may answer guests from it while commands write to it: a lock guards each change, and each file is replaced
as a whole.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from cryptography import x509

from isthmus.errors import IdentityError, RecipeError, RunError
from isthmus.recipe import Recipe
from isthmus.recipe.address import checked_address
from isthmus.recipe.tree import ROOT
from isthmus.storage.files import PRIVATE, disk_errors, private_folder, writing
from isthmus.wire.authority import Authority
from isthmus.wire.identity import CA, KEY, REVOKED, Identity, Role
from isthmus.wire.invite import Invite, compressed, fingerprint

AUTHORITY_DAYS = 3650.0
"""Validity of the authority's own certificate."""
PARTY_DAYS = 90.0
"""Validity of a party's certificate, which is renewed by itself."""
INVITE_DAYS = 7.0
OWN_SERVER = "authority"
"""Name of an authority's own server."""
SETTINGS, INVITES, PARTIES = "settings.json", "invites", "parties"
_AGAIN = "ask who leads the federation for a new invite"
_Kept = TypeVar("_Kept", "OpenInvite", "IssuedCertificate")


@dataclass(frozen=True)
class OpenInvite:
    """What the authority keeps of an invite: nothing of its secret."""

    id: str
    name: str
    role: Role
    anchor: str
    """PEM certificate by which the guest is trusted."""
    expires: float
    """Seconds since 1970."""
    used: float | None = None
    withdrawn: float | None = None

    def check(self) -> None:
        """Raise ``IdentityError`` unless it is still open."""
        if self.used is not None:
            raise IdentityError(
                f"this invite of {self.name} was used on {_minute(self.used)}; each works once",
                remedy=f"{_AGAIN}; if nobody you know used it, have {self.name} revoked",
            )
        if self.withdrawn is not None:
            raise IdentityError(f"this invite of {self.name} was withdrawn on {_minute(self.withdrawn)}", remedy=_AGAIN)
        if _now() > self.expires:
            raise IdentityError(f"this invite of {self.name} expired on {_minute(self.expires)}", remedy=_AGAIN)


@dataclass(frozen=True)
class IssuedCertificate:
    """A certificate of a party."""

    serial: str
    """In hex."""
    name: str
    role: Role
    issued: float
    expires: float
    revoked: float | None = None

    @property
    def valid(self) -> bool:
        """Whether it counts now."""
        return self.revoked is None and _now() <= self.expires


class AuthorityFolder:
    """A federation's authority on the disk of who leads it.

    Args:
        path: a folder that ``create`` made.

    Raises:
        RunError: it is none.
        IdentityError: its key or certificate is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
            certificate, key = ((path / file).read_bytes() for file in (CA, KEY))
            self.recipe_path, self._days = Path(settings["recipe"]), float(settings["days"])
            self.server: str = settings["server"]
            self._address: str | None = settings["address"]
            self._first = frozenset(settings["silos"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RunError(
                f"{path} is not the folder of an authority", remedy="make one with 'isthmus authority init RECIPE'"
            ) from error
        self._authority = Authority.load(certificate, key, days=self._days)
        self._added = frozenset[str]()
        self._read: tuple[int, tuple[OpenInvite, ...]] | None = None

    @classmethod
    def create(
        cls,
        path: Path,
        recipe: Path,
        *,
        server: str = "trunk",
        address: str | None = None,
        days: float = PARTY_DAYS,
    ) -> Self:
        """A new authority in this folder.

        Args:
            recipe: the federation's recipe, whose parties it invites.
            server: who answers guests: ``trunk``, ``root``, or ``authority``, a server of its own.
            address: ``host:port`` of that server; None: the recipe's.
            days: validity of the certificates that it issues.

        Raises:
            RecipeError: the recipe cannot be read, or the address is none.
            RunError: the folder holds an authority already.
        """
        first = Recipe.read(recipe, undecided=True)
        if address is None and server not in ("trunk", ROOT):
            raise RecipeError(
                "an authority with a server of its own needs an address", remedy="add --address host:port"
            )
        if address is not None:
            checked_address(address)
        if (path / KEY).exists():
            raise RunError(
                f"{path} holds an authority already",
                remedy="go on with it; all certificates would have to be made anew by another one",
            )
        authority = Authority(days=AUTHORITY_DAYS)
        with disk_errors(path):
            private_folder(path)
            for folder in (INVITES, PARTIES):
                private_folder(path / folder)
        settings = {
            "recipe": str(recipe.resolve()),
            "server": server,
            "address": address,
            "days": days,
            "silos": list(first.tree.silos),
        }
        _write(path / CA, authority.certificate)
        _write(path / SETTINGS, json.dumps(settings).encode())
        _write(path / REVOKED, authority.revocations({}))
        _write(path / KEY, authority.key)
        return cls(path)

    @property
    def certificate(self) -> bytes:
        """The authority's PEM certificate."""
        return self._authority.certificate

    @property
    def revoked(self) -> bytes:
        """The PEM list of revoked certificates."""
        return (self.path / REVOKED).read_bytes()

    def added(self) -> frozenset[str]:
        """Silos that the recipe has now, and had not when the authority was made; those that it had last, while it
        cannot be read (half written, say)."""
        with suppress(RecipeError):
            self._added = frozenset(self.recipe().tree.silos) - self._first
        return self._added

    def roster(self) -> bytes:
        """The signed list of ``added``, for the silos that were there."""
        return self._authority.roster(self.added())

    @property
    def fingerprint(self) -> str:
        """Of the authority's key, for people to compare."""
        return fingerprint(compressed(self._authority.public_key))

    @property
    def address(self) -> str:
        """``host:port`` at which guests are answered."""
        recipe = self.recipe()
        return self._address or (recipe.root if self.server == ROOT else recipe.trunk).address

    def recipe(self) -> Recipe:
        """The federation's recipe as it is now."""
        return Recipe.read(self.recipe_path, undecided=True)

    def invite(self, name: str, *, days: float = INVITE_DAYS) -> Invite:
        """A new invite for a party of the recipe. An earlier one for it that is still open is withdrawn.

        Args:
            days: validity.

        Raises:
            RecipeError: the recipe has no such party.
        """
        role = self.recipe().tree.role(name)
        made = Invite.make(name, role, self.address, self.server, self._authority.public_key, days=days)
        with self._locked():
            for other in self.invites():
                if other.name == name and other.used is None and other.withdrawn is None:
                    self._keep(replace(other, withdrawn=_now()))
            self._keep(OpenInvite(made.id, name, made.role, made.anchor.decode(), made.expires.timestamp()))
        return made

    def invites(self) -> tuple[OpenInvite, ...]:
        """All invites, the used and expired ones too."""
        state = (self.path / INVITES).stat().st_mtime_ns
        if self._read is None or self._read[0] != state:
            self._read = state, self._all(INVITES, OpenInvite)
        return self._read[1]

    def certificates(self) -> tuple[IssuedCertificate, ...]:
        """All certificates that were issued to parties."""
        return self._all(PARTIES, IssuedCertificate)

    def enroll(self, id: str, request: bytes) -> bytes:
        """The PEM certificate of a guest, whose invite is used with it. Earlier certificates of the party are revoked.

        Args:
            id: of the invite.
            request: PEM signing request of the party's key.

        Raises:
            IdentityError: the invite is not open, or the request is damaged.
        """
        with self._locked():
            invite = next(one for one in self.invites() if one.id == id)
            invite.check()
            certificate = self._authority.answer(request, invite.name, invite.role, also=self._also(invite.name))
            self._keep(replace(invite, used=_now()))
            self._revoke(invite.name)
            self._enter(certificate, invite.name, invite.role)
        return certificate

    def renew(self, name: str, request: bytes) -> bytes:
        """A PEM certificate of a party's next key. The last one stays valid until it expires.

        Raises:
            IdentityError: it has no valid certificate, or the request is damaged.
        """
        with self._locked():
            role = self.role_of(name)
            certificate = self._authority.answer(request, name, role, also=self._also(name))
            self._enter(certificate, name, role)
        return certificate

    def issue(self, name: str) -> Identity:
        """A new identity of a server that runs where the authority is: a party, or the authority's own server.

        Raises:
            RecipeError: the recipe has no such party.
        """
        with self._locked():
            role: Role = "root" if name == self.server == OWN_SERVER else self.recipe().tree.role(name)
            identity = self._authority.issue(name, role, also=self._also(name))
            self._enter(identity.certificate, name, role)
        return replace(identity, revoked=self.revoked)

    def role_of(self, name: str) -> Role:
        """The role of a party that has a valid certificate.

        Raises:
            IdentityError: there is none.
        """
        for one in self.certificates():
            if one.name == name and one.valid:
                return one.role
        raise IdentityError(f"{name[:64]!r} has no valid certificate of this authority", remedy=_AGAIN)

    def revoke(self, name: str) -> int:
        """Revoke all certificates of a party and withdraw its invites. Returns how many there were.

        Raises:
            IdentityError: there were none.
        """
        with self._locked():
            count = self._revoke(name)
            for invite in self.invites():
                if invite.name == name and invite.used is None and invite.withdrawn is None:
                    self._keep(replace(invite, withdrawn=_now()))
                    count += 1
        if not count:
            known = sorted({one.name for one in self.certificates() if one.valid})
            raise IdentityError(
                f"{name!r} has no certificate and no invite of this authority",
                remedy=f"name one of: {', '.join(known)}" if known else "nobody has joined yet",
            )
        return count

    def _revoke(self, name: str) -> int:
        valid = [one for one in self.certificates() if one.name == name and one.valid]
        for one in valid:
            self._keep(replace(one, revoked=_now()))
        if valid:
            listed = {int(one.serial, 16): _time(one.revoked) for one in self.certificates() if one.revoked is not None}
            _write(self.path / REVOKED, self._authority.revocations(listed))
        return len(valid)

    def _also(self, name: str) -> tuple[str, ...]:
        """The trunk's certificate is the root's, too, where one server is both."""
        recipe = self.recipe()
        return (ROOT,) if name == "trunk" and recipe.trunk.address == recipe.root.address else ()

    def _enter(self, certificate: bytes, name: str, role: Role) -> None:
        read = x509.load_pem_x509_certificate(certificate)
        self._keep(
            IssuedCertificate(f"{read.serial_number:x}", name, role, _now(), read.not_valid_after_utc.timestamp())
        )

    def _keep(self, one: OpenInvite | IssuedCertificate) -> None:
        place = INVITES if isinstance(one, OpenInvite) else PARTIES
        name = one.id if isinstance(one, OpenInvite) else one.serial
        _write(self.path / place / f"{name}.json", json.dumps(asdict(one)).encode())

    def _all(self, place: str, kind: type[_Kept]) -> tuple[_Kept, ...]:
        found = []
        for file in sorted((self.path / place).glob("*.json")):
            try:
                found.append(kind(**cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))))
            except (OSError, ValueError, TypeError) as error:
                raise RunError(f"{file} is damaged", remedy="restore the authority's folder from a copy") from error
        return tuple(found)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the folder, whatever the process."""
        with disk_errors(self.path):
            file = os.fdopen(os.open(self.path / "lock", os.O_WRONLY | os.O_CREAT, PRIVATE), "w")
        with file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            self._read = None
            yield


def _write(path: Path, data: bytes) -> None:
    with writing(path) as temporary:
        temporary.write_bytes(data)


def _now() -> float:
    return datetime.datetime.now(datetime.UTC).timestamp()


def _time(seconds: float | None) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds or 0.0, datetime.UTC)


def _minute(seconds: float) -> str:
    return f"{_time(seconds):%Y-%m-%d %H:%M} UTC"
