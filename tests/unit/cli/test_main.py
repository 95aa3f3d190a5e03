"""The command line and the exported names, written down: what users' scripts rely on changes here or nowhere."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import isthmus
from isthmus.cli.main import app
from isthmus.recipe import Recipe
from tests.integration.processes import call

COMMANDS = {
    "init": [
        *(
            "RECIPE?",
            "--model=",
            "--silo=",
            "--held-out=",
            "--task=",
            "--prompt=",
            "--answer=",
            "--cut=auto",
            "--address=",
        ),
        *("--masks/--no-masks=", "--example=", "--force=False", "--json=False"),
    ],
    "run": ["RECIPE?", "--run-dir=runs/latest", "--resume=", "--baseline=", "--json=False"],
    "flower": ["RECIPE", "OUT", "--simulation/--no-simulation=False", "--run-dir=runs/flower", "--json=False"],
    "abort": ["RUN_DIR", "--json=False"],
    "trunk": [
        "RECIPE",
        "--run-dir=runs/trunk",
        "--address=",
        "--with-root/--no-with-root=False",
        "--round=",
        "--replica=False",
        "--authority=",
        "--metrics=",
        "--flower=",
    ],
    "root": ["RECIPE", "--run-dir=runs/root", "--address=", "--authority=", "--metrics=", "--flower="],
    "edge": ["RECIPE", "NAME", "--run-dir=runs/edge", "--address=", "--parent=", "--metrics="],
    "silo": ["RECIPE", "NAME", "--run-dir=runs/silo", "--trunk=", "--root=", "--edge=", "--flower="],
    "certificates": ["RECIPE", "--json=False"],
    "authority init": ["RECIPE", "FOLDER?", "--server=trunk", "--address=", "--days=90.0", "--json=False"],
    "authority serve": ["FOLDER?", "--address=", "--metrics="],
    "authority show": ["FOLDER?", "--json=False"],
    "invite": ["NAMES", "--authority=authority", "--days=7.0", "--json=False"],
    "join": [
        *("INVITE", "--folder=", "--train=", "--held-out=", "--check/--no-check=True", "--run=False", "--json=False"),
    ],
    "doctor": ["RECIPE", "NAME?", "--run-dir=", "--dry-run/--no-dry-run=True", "--json=False"],
    "revoke": ["NAME", "--authority=authority", "--json=False"],
    "generate": [
        *("RUN_DIR", "PROMPT?", "--silo=", "--max-new-tokens=", "--field=", "--raw/--no-raw=False"),
        *("--chat/--no-chat=False", "--trunk=", "--round=", "--json=False"),
    ],
    "batch": ["RUN_DIR", "ROWS", "OUT", "--silo=", "--max-new-tokens=", "--trunk=", "--round=", "--json=False"],
    "draft": ["RUN_DIR", "--silo=", "--prompts=500", "--max-new-tokens=96", "--trunk=", "--json=False"],
    "gateway": [
        *("RUN_DIR", "--silo=", "--host=127.0.0.1", "--port=8000", "--api-keys=", "--together=16", "--waiting=64"),
        *("--max-new-tokens=1024", "--conversations=4", "--trunk=", "--round="),
    ],
    "chat": [
        *("RUN_DIR", "--silo=", "--max-new-tokens=512", "--temperature=0.0", "--system=", "--trunk=", "--round="),
    ],
    "privacy": ["RUN_DIR", "--plan=False", "--json=False"],
    "data": ["RECIPE", "--silo=", "--examples=5", "--json=False"],
    "evaluate": [
        *("RUN_DIR", "--data=", "--silo=", "--out=", "--max-new-tokens=", "--trunk=", "--round=", "--json=False")
    ],
    "export": ["RUN_DIR", "OUT", "--round=", "--json=False"],
    "attack": [
        "TARGET",
        "--adversary=['trunk+silo']",
        "--attack=",
        "--rows=40",
        "--own-rows=1000",
        "--victim=",
        "--colluder=",
        "--public=",
        "--inference/--no-inference=False",
        "--references=2",
        "--device=cpu",
        "--json=False",
    ],
    "cut": [
        *("RECIPE", "--silo=", "--cuts=", "--rows=", "--attack=['linear']", "--memory=", "--leakage=", "--rtt="),
        *("--bandwidth=", "--trunk/--no-trunk=True", "--own=False", "--write=False", "--json=False"),
    ],
    "check": ["MODEL", "--cut=", "--length=64", "--json=False"],
    "demo": ["--run-dir=runs/demo", "--cache=build/demo", "--quick/--no-quick=False", "--seed=1", "--json=False"],
}
WITHOUT_JSON = {
    **dict.fromkeys(("trunk", "root", "edge", "authority serve", "gateway"), "a server: its log says what it does"),
    "silo": "runs until the federation has finished: its log and journals say what it does",
    "chat": "a conversation",
}
"""Commands that print no result, each with the reason."""
EXPORTED = {"IsthmusError", "Recipe", "__version__", "join", "open"}
RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.toml"))


def _written(parameter: Any) -> str:
    """A parameter as in ``COMMANDS``: an argument in capitals (``?`` if it may be left out), an option with default."""
    if parameter.param_type_name == "argument":
        return f"{parameter.name.upper()}{'' if parameter.required else '?'}"
    default = "" if parameter.default is None else parameter.default
    return f"{'/'.join([*parameter.opts, *parameter.secondary_opts])}={default}"


def _commands() -> dict[str, Any]:
    """All commands by what is typed, those of groups too."""
    found: dict[str, Any] = {}
    for name, one in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        found |= {f"{name} {own}": each for own, each in getattr(one, "commands", {}).items()} or {name: one}
    return found


def test_commands_and_their_parameters() -> None:
    commands = _commands()
    assert {name: [_written(one) for one in command.params] for name, command in commands.items()} == COMMANDS
    for name, command in commands.items():
        assert command.help, name
        assert all(one.help for one in command.params), name


def test_help_names_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = call(capsys, monkeypatch, "--help")
    shown.succeeded()
    assert all(f" {name.split()[0]} " in shown.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_its_parameters(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = call(capsys, monkeypatch, *name.split(), "--help")
    shown.succeeded()
    for parameter in COMMANDS[name]:
        assert parameter.partition("=")[0].split("/")[0].rstrip("?").lower() in shown.out.lower()


def test_exported_names() -> None:
    assert set(isthmus.__all__) == EXPORTED
    assert all(getattr(isthmus, name) is not None for name in EXPORTED)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = isthmus.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_parses(path: Path) -> None:
    recipe = Recipe.read(path)
    assert Recipe.read(path).toml() == recipe.toml()


def test_there_are_shipped_recipes() -> None:
    assert RECIPES


def test_the_command_is_installed() -> None:
    assert (Path(sys.executable).parent / "isthmus").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_ends_with_an_example_that_it_takes(name: str) -> None:
    command = _commands()[name]
    program, *arguments = shlex.split(command.epilog.removeprefix("Example: "))
    called, arguments = arguments[: len(name.split())], arguments[len(name.split()) :]
    assert (program, called) == ("isthmus", name.split())
    command.make_context(name, arguments)  # raises on what the command does not know
    shown = " ".join(CliRunner().invoke(app, [*name.split(), "--help"]).output.split())
    assert command.epilog in shown


def test_every_command_that_prints_a_result_prints_json() -> None:
    """Those are documented, too: a row each."""
    with_json = {name for name, parameters in COMMANDS.items() if "--json=False" in parameters}
    assert with_json | WITHOUT_JSON.keys() == COMMANDS.keys()
    assert not with_json & WITHOUT_JSON.keys()
    page = (Path(__file__).parents[3] / "docs" / "features" / "commands.md").read_text(encoding="utf-8")
    assert not {name for name in with_json if f"| `{name}` |" not in page}
    assert not {name for name in WITHOUT_JSON if f"`{name}`" not in page}
