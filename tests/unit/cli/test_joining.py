from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.errors import IdentityError, RecipeError
from isthmus.wire.invite import Invite
from tests.integration.processes import write_recipe


def run(*arguments: object, text: str | None = None) -> str:
    found = CliRunner().invoke(app, list(map(str, arguments)), input=text, standalone_mode=False)
    if found.exception is not None:
        raise found.exception
    return found.stdout


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    recipe = write_recipe(tmp_path / "recipe.toml", trunk={"address": "a.example.org:7001"})
    shown = run("authority", "init", recipe, tmp_path / "authority")
    assert f"next: isthmus trunk {recipe} --authority {tmp_path / 'authority'}; isthmus invite" in shown
    return tmp_path / "authority"


def test_what_invite_prints_to_standard_output_is_the_invite_alone(authority: Path) -> None:
    invite = Invite.parse(run("invite", "north", "--authority", authority))
    assert (invite.name, invite.role, invite.address) == ("north", "silo", "a.example.org:7001")


def test_several_are_invited_at_once_or_none(authority: Path) -> None:
    lines = run("invite", "north", "south", "--authority", authority).splitlines()
    assert [Invite.parse(line).name for line in lines] == ["north", "south"]
    with pytest.raises(RecipeError, match="no party 'nobody'"):
        run("invite", "north", "nobody", "--authority", authority)
    assert len(list((authority / "invites").iterdir())) == 2


def test_the_parties_are_shown_at_80_columns(authority: Path) -> None:
    run("invite", "north", "--authority", authority)
    shown = run("authority", "show", authority)
    assert "invited" in shown
    assert max(map(len, shown.splitlines())) <= 80
    run("revoke", "north", "--authority", authority)
    assert "invited" not in run("authority", "show", authority)


def test_an_invite_comes_as_a_word_from_a_file_or_from_standard_input(authority: Path, tmp_path: Path) -> None:
    """Each gets so far that rows are looked for."""
    line = run("invite", "north", "--authority", authority)
    (tmp_path / "invite.txt").write_text(line)
    for given, text in ((line.strip(), None), (tmp_path / "invite.txt", None), ("-", line)):
        with pytest.raises(Exception, match=r"no file missing\.csv"):
            run("join", given, "--train", "missing.csv", "--folder", tmp_path / "north", text=text)


def test_a_word_that_is_no_invite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="no invite"):
        run("join", "north", "--folder", tmp_path / "north")
    assert not (tmp_path / "north").exists()
