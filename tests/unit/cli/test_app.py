from __future__ import annotations

from typer.testing import CliRunner

import isthmus
from isthmus.cli.app import notify
from isthmus.cli.main import app


def test_the_help_names_the_exit_codes() -> None:
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert "0 done, 1 an error (its remedy is printed), 2 wrong arguments, 130 stopped." in shown


def test_the_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"isthmus {isthmus.__version__}\n"


def test_a_note_stands_beside_the_output(capsys) -> None:  # type: ignore[no-untyped-def]
    notify("opening")
    assert capsys.readouterr() == ("", "opening\n")
