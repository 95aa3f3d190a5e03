"""The parties of a federation, as its authority knows them."""

from __future__ import annotations

import datetime
from dataclasses import astuple, dataclass, fields

from rich.console import Console
from rich.table import Table

from isthmus.joining.authority_folder import AuthorityFolder


@dataclass(frozen=True)
class PartyLine:
    """One certificate of a party, or its open invite."""

    party: str
    role: str
    certificate: str
    """``valid``, ``expired``, ``invited``, or since when it is revoked."""
    until: str
    """The day, by UTC."""


def party_lines(folder: AuthorityFolder) -> list[PartyLine]:
    """Who has which certificate, by name, then which invites are open."""
    lines = []
    for one in sorted(folder.certificates(), key=lambda one: (one.name, one.issued)):
        state = f"revoked {_day(one.revoked)}" if one.revoked is not None else "valid" if one.valid else "expired"
        lines.append(PartyLine(one.name, one.role, state, _day(one.expires)))
    for invite in folder.invites():
        if invite.used is None and invite.withdrawn is None:
            lines.append(PartyLine(invite.name, invite.role, "invited", _day(invite.expires)))
    return lines


def show_parties(folder: AuthorityFolder, console: Console) -> None:
    """Print these lines as a table."""
    table = Table(box=None, pad_edge=False)
    for field in fields(PartyLine):
        table.add_column(field.name, overflow="fold")
    for line in party_lines(folder):
        table.add_row(*astuple(line))
    console.print(f"authority {folder.path}, fingerprint {folder.fingerprint}", highlight=False)
    console.print(table)


def _day(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d}"
