"""Ending a federation early: only where a root runs, and a round is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.engines.early_end import end_early
from isthmus.errors import RunError
from isthmus.storage.record import RunDirectory
from tests.conftest import make_recipe


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.record(make_recipe(Path("model"), silos=("north",), train={"rounds": 3}))
    run.role("root").journal("metrics")
    return run


@pytest.mark.parametrize("lock", [{"shared": True, "role": "root"}, {}], ids=["a root", "an engine"])
def test_a_running_root_is_asked_once(run: RunDirectory, lock: dict[str, object]) -> None:
    run.role("root").save_round(2, {})
    with run.locked(**lock):  # type: ignore[arg-type]
        assert end_early(run) == 2
        assert end_early(run) == 2
    assert run.role("root").ended_early
    run.role("root").go_on()
    run.role("root").go_on()
    assert not run.role("root").ended_early


def test_where_no_root_runs_nothing_is_asked(run: RunDirectory) -> None:
    with run.locked(role="north"), pytest.raises(RunError, match="no root runs"):
        end_early(run)
    assert not run.role("root").ended_early


def test_where_no_round_is_left_nothing_is_asked(run: RunDirectory) -> None:
    run.role("root").save_round(3, {})
    with run.locked(role="root"), pytest.raises(RunError, match="3 of 3"):
        end_early(run)
    assert not run.role("root").ended_early
