from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from isthmus.joining.authority_folder import AuthorityFolder
from isthmus.report.party_table import party_lines, show_parties
from tests.integration.processes import write_recipe


def test_each_certificate_and_open_invite_has_a_line(tmp_path: Path) -> None:
    folder = AuthorityFolder.create(tmp_path / "authority", write_recipe(tmp_path / "recipe.toml"))
    for name in ("trunk", "south"):
        folder.issue(name)
    folder.revoke("south")
    folder.invite("north")
    out = io.StringIO()
    show_parties(folder, Console(file=out, width=80))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert [line[:3] for line in lines if line[0] in ("trunk", "south", "north")] == [
        ["south", "silo", "revoked"],
        ["trunk", "trunk", "valid"],
        ["north", "silo", "invited"],
    ]
    assert folder.fingerprint in out.getvalue()
    told = [(one.party, one.role, one.certificate.split()[0]) for one in party_lines(folder)]
    assert told == [("south", "silo", "revoked"), ("trunk", "trunk", "valid"), ("north", "silo", "invited")]
