"""A process's place by torchrun's variables, and commands that are not for it."""

from __future__ import annotations

import sys

import pytest

from isthmus.cli.main import main
from isthmus.engines import lifetime
from isthmus.engines.rank_place import RankPlace
from isthmus.errors import RecipeError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_the_place_by_torchruns_variables() -> None:
    assert RankPlace.find(TORCHRUN) == RankPlace(5, 6, 1)
    assert RankPlace.find({**TORCHRUN, "LOCAL_WORLD_SIZE": "6"}) == RankPlace(5, 6, 1, attempt=2)


def test_a_process_alone_has_none() -> None:
    assert RankPlace.find({}) is None
    assert RankPlace.find({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None
    assert RankPlace.find({name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}) is None


def test_a_role_of_an_engine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who trains by torchrun, and opens a run meanwhile, starts a trunk that is no rank."""
    monkeypatch.setattr(lifetime._Engine, "started", True)
    assert RankPlace.find(TORCHRUN) is None


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(RecipeError, match="are no numbers"):
        RankPlace.find({**TORCHRUN, "RANK": "first"})


@pytest.mark.parametrize("command", ["silo", "root", "run"])
def test_other_commands_are_refused(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["isthmus", command, "recipe.toml", *(["north"] if command == "silo" else [])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert f"error: torchrun started 'isthmus {command}' 6 times; it is for the trunk alone" in told
    assert f"remedy: start 'isthmus {command}' without torchrun" in told
