from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.errors import IdentityError, RecipeError
from isthmus.wire.invite import Invite
from tests.integration.processes import rows_of, write_recipe, write_rows
from tests.unit.joining.test_join import Coordinator


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


def test_joining_ends_with_the_doctors_checks_and_fails_with_remedies(tmp_path: Path) -> None:
    leader = Coordinator(tmp_path / "leader")
    own = write_rows(tmp_path / "own.jsonl", rows_of("own"))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with leader.serving():
        invite = leader.authority.invite("north")
        found = invoked("join", invite, "--train", tmp_path / "bad.jsonl", "--folder", tmp_path / "north")
        assert found.exit_code == 1
        assert "failed   rows: " in found.stdout
        assert "remedy: " in found.stdout
        assert "failed   trunk" not in found.stdout
        again = "join", invite, "--train", own, "--folder", tmp_path / "north"
        assert "recipe: " not in run(*again, "--no-check")
        told = json.loads(invoked(*again, "--no-check", "--json").stdout)
        assert told == {
            "party": "north",
            "role": "silo",
            "folder": str(tmp_path / "north"),
            "recipe": str(tmp_path / "north" / "recipe.toml"),
        }
        examined = json.loads(invoked(*again, "--json").stdout)
        assert examined.items() > told.items()
        assert not examined["failed"]
        whole = run(*again)  # the same invite goes on, with rows that can be read
        assert "ok       dry run: 10 steps" in whole
        assert whole.splitlines()[-1].startswith("next: isthmus silo")
        assert max(map(len, whole.splitlines()[1:-1])) <= 80


def test_the_doctor_says_what_is_wrong_in_json_too(tmp_path: Path) -> None:
    leader = Coordinator(tmp_path / "leader")
    found = invoked("doctor", leader.recipe_path, "--json")  # the trunk's certificate is the one that is here
    assert found.exit_code == 0, found.stdout
    read = json.loads(found.stdout)
    assert (read["party"], read["role"], read["failed"]) == ("trunk", "trunk", False)
    missing = invoked("doctor", leader.recipe_path, "north", "--json")
    assert missing.exit_code == 1
    states = {one["check"]: one["state"] for one in json.loads(missing.stdout)["findings"]}
    assert states["certificate"] == "failed"
    assert states["rows"] == "ok"


def invoked(*arguments: object) -> Result:
    """What ``main`` makes of it, errors as exit codes."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_longest_invite_is_no_files_name(tmp_path: Path) -> None:
    """Names of 63 characters at an address of 253 make a word that no file could have."""
    address = f"{'a' * 60}.{'b' * 60}.{'c' * 60}.{'d' * 60}.example.org:50051"
    recipe = write_recipe(
        tmp_path / "recipe.toml",
        trunk={"address": address},
        silo=[{"name": "n" * 63, "train": "n.jsonl"}],
        train={"evaluate": False},
    )
    run("authority", "init", recipe, tmp_path / "authority")
    line = run("invite", "n" * 63, "--authority", tmp_path / "authority").strip()
    assert len(line) > 255
    with pytest.raises(Exception, match=r"no file missing\.csv"):
        run("join", line, "--train", "missing.csv", "--folder", tmp_path / "north")
    with pytest.raises(IdentityError, match="no invite"):
        run("join", "x" * 4000, "--folder", tmp_path / "north")
