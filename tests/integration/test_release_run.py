"""A federation that releases each example once, as real processes: counted in its ledgers, also when it is cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.privacy.ledger import read_ledger
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from tests.integration.processes import (
    Commands,
    assert_no_traceback,
    call,
    rows_of,
    steps_of,
    train_here,
    until_step,
    write_federation,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
ROUNDS, STEPS = 4, 12


def test_each_example_leaves_once_in_a_run_that_is_cut_off_and_resumed(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_federation(
        tmp_path / "made",
        train={"rounds": ROUNDS, "steps": STEPS},
        lora={"freeze_bottom": True},
        boundary={
            "release_once": True,
            "differences": True,
            "codec": {"forward_down": "range-0.25"},
            "forward": {"noise": 0.02},
        },
    )
    run = tmp_path / "run"
    cut_off = commands.start("run", recipe, "--run-dir", run)
    until_step(run, 2, 3, cut_off)  # every row has been seen
    cut_off.role("trunk").kill()
    cut_off.wait().failed("the trunk was killed by SIGKILL", "isthmus run --resume")
    train_here(RunDirectory.open(run))

    for silo in ("north", "south"):
        events = [one for one in read_ledger(run / "silos" / silo / "ledger.jsonl").releases() if one.path == "forward"]
        texts = {str(row) for row in rows_of(silo)}
        assert len(events) == len(texts)
        assert {event.noise for event in events} == {0.02}
        kept, released = run / "trunk" / "kept" / silo, run / "silos" / silo / "released"
        names = {path.name for path in kept.iterdir()}
        assert names == {path.name for path in released.iterdir()} - {"secret", "answers"}
        answered = [
            {path.name for path in folder.iterdir()} for folder in (run / "trunk/answers" / silo, released / "answers")
        ]
        assert answered[0] == answered[1] >= names  # held-out rows are answered, too, where they are released
        assert all((kept / name).read_bytes() == (released / name).read_bytes() for name in names)
        assert len(names) == len(texts)
        assert steps_of(run, silo)[-1] == (ROUNDS, STEPS)
    measured = [line for line in read_journal(run / "silos/north/metrics.jsonl") if line["event"] == "evaluation"]
    assert measured[-1]["loss"] < measured[0]["loss"]
    assert_no_traceback(run)
    call(capsys, monkeypatch, "export", run, tmp_path / "adapter").succeeded()
    call(capsys, monkeypatch, "generate", run, rows_of("north")[0]["text"], "--max-new-tokens", 3).succeeded()
