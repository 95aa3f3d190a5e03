"""What commands print at their end: with ``--json`` one value with the documented keys, else what to type next."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.commands import assert_understood
from tests.integration.processes import call, run_here, write_federation

pytestmark = pytest.mark.process
PAGE = (Path(__file__).parents[2] / "docs" / "features" / "commands.md").read_text(encoding="utf-8")
RESULTS = {
    "init": "init new.toml --model model --silo north=north.jsonl --silo south=south.jsonl --task sentiment",
    "run": "run recipe.toml --run-dir new",
    "run --baseline": "run --resume run --baseline alone",
    "certificates": "certificates recipe.toml",
    "authority init": "authority init recipe.toml new",
    "invite": "invite north south",
    "authority show": "authority show authority",
    "revoke": "revoke north",
    "generate": 'generate run "w4 w5" --max-new-tokens 2',
    "batch": "batch run rows.jsonl answers.jsonl --max-new-tokens 2",
    "draft": "draft run --prompts 2 --max-new-tokens 4",
    "evaluate": "evaluate run --silo north",
    "export": "export run adapter",
    "data": "data recipe.toml",
    "attack": "attack run --attack linear --rows 2",
    "cut": 'cut recipe.toml --cuts "1,1" --rows 0',
    "check": "check model --cut 1,1 --length 8",
}
"""A call of each command with a JSON object."""
ELSEWHERE = {
    "abort": "tests/integration/test_early_end.py",
    "privacy": "tests/integration/test_run.py",
    "demo": "tests/integration/test_demo.py",
    "join": "tests/unit/cli/test_joining.py",
    "doctor": "tests/integration/test_doctor.py",
    "flower": "tests/integration/test_flower_deployment.py",
}
WORDS = {"PROMPT": "text", "OUT": "folder", "NAME": "north", "INVITE": "isthmus:AAAA", "ROWS": "rows.jsonl"}
"""What users write in place of a placeholder."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, a finished run, an authority and rows."""
    folder = tmp_path_factory.mktemp("federation")
    recipe = write_federation(folder, train={"rounds": 1, "steps": 1, "evaluate": False})
    run_here(recipe, folder / "run")
    (folder / "rows.jsonl").write_text('{"text": "w4 w5"}\n')
    return folder


def documented(name: str) -> set[str]:
    """The keys that the page names, of some commands not all."""
    (row,) = re.findall(rf"^\| `{re.escape(name)}` \| (.+) \|$", PAGE, flags=re.MULTILINE)
    return set(re.findall(r"`(\w+)`", re.sub(r"\(.*\)", "", row).split("; with")[0]))


def test_every_object_of_the_page_is_tried() -> None:
    rows = set(re.findall(r"^\| `([a-z -]+)` \|", PAGE, flags=re.MULTILINE))
    assert rows == RESULTS.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_as_json_and_what_is_next(
    name: str, federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, form in enumerate(("json", "text")):
        folder = tmp_path / form
        shutil.copytree(federation, folder)
        monkeypatch.chdir(folder)
        if name in ("invite", "revoke", "authority show"):
            call(capsys, monkeypatch, "authority", "init", "recipe.toml").succeeded()
            call(capsys, monkeypatch, "invite", "north").succeeded()
        done = call(capsys, monkeypatch, *shlex.split(RESULTS[name]), *["--json"] * (not number))
        done.succeeded()
        if form == "json":
            found = json.loads(done.out)
            assert documented(name)
            assert not documented(name) - found.keys()
            if "and more" not in PAGE.split(f"| `{name}` |")[1].split("\n")[0]:
                assert found.keys() == documented(name)
        else:
            lines = [line for line in (done.out + done.err).splitlines() if line.startswith("next")]
            assert lines
            assert lines[-1] in (done.out.splitlines()[-1], done.err.splitlines()[-1] if done.err else "")
            for command in re.findall(r"isthmus ([a-z][^;,]*)", lines[-1]):
                assert_understood(" ".join(WORDS.get(word, word) for word in command.split()))
