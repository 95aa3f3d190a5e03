"""The parties of a federation, as its authority knows them."""

from __future__ import annotations

import datetime

from rich.console import Console
from rich.table import Table

from isthmus.joining.authority_folder import AuthorityFolder


def show_parties(folder: AuthorityFolder, console: Console) -> None:
    """Print who has which certificate, and which invites are open."""
    table = Table(box=None, pad_edge=False)
    for title in ("party", "role", "certificate", "until"):
        table.add_column(title, overflow="fold")
    for one in sorted(folder.certificates(), key=lambda one: (one.name, one.issued)):
        state = f"revoked {_day(one.revoked)}" if one.revoked is not None else "valid" if one.valid else "expired"
        table.add_row(one.name, one.role, state, _day(one.expires))
    for invite in folder.invites():
        if invite.used is None and invite.withdrawn is None:
            table.add_row(invite.name, invite.role, "invited", _day(invite.expires))
    console.print(f"authority {folder.path}, fingerprint {folder.fingerprint}", highlight=False)
    console.print(table)


def _day(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d}"
