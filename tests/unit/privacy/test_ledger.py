"""The ledger: in order, in a chain, held by one; and every way in which it may be damaged is named and refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.errors import DiskFullError, LedgerError, LedgerTakenError
from isthmus.privacy.accountant import Accountant
from isthmus.privacy.events import Charge, Release
from isthmus.privacy.ledger import (
    GENESIS,
    FileLedger,
    Ledger,
    MemoryLedger,
    head_of,
    read_ledger,
    release_from_json,
    release_to_json,
)


def release(step: int) -> Release:
    charges = (Charge(f"r{step % 2}", 0.1 * step), Charge("other", 0.0, 1.0), Charge("open", math.inf))
    return Release("forward", step, rows=7, width=32, clip=1.5, noise=0.25, size=896, charges=charges)


RELEASES = [release(step) for step in range(1, 6)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "ledger.jsonl"


@pytest.fixture
def written(path: Path) -> Path:
    """A ledger of five releases, closed."""
    ledger = FileLedger(path, silo="north", recipe="r1")
    for one in RELEASES:
        ledger.record(one)
    ledger.close()
    return path


def reopened(path: Path, **how: object) -> FileLedger:
    return FileLedger(path, **{"silo": "north", "recipe": "r1", **how})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_releases_are_kept_in_order(kind: str, path: Path) -> None:
    ledger: Ledger = MemoryLedger() if kind == "memory" else FileLedger(path)
    for one in RELEASES:
        ledger.record(one)
    assert list(ledger.history()) == RELEASES


def test_a_reopened_ledger_goes_on_where_it_was(written: Path) -> None:
    ledger = reopened(written)
    ledger.record(release(6))
    assert list(ledger.history()) == [*RELEASES, release(6)]
    entries = [json.loads(line) for line in written.read_text().splitlines()]
    assert [entry["seq"] for entry in entries] == list(range(7))
    assert (entries[0]["silo"], entries[0]["recipe"]) == ("north", "r1")
    assert entries == sorted(entries, key=lambda entry: entry["time"])


def test_a_line_is_on_the_file_and_in_the_head_when_record_returns(path: Path) -> None:
    ledger = FileLedger(path)
    for count, one in enumerate(RELEASES, 2):
        ledger.record(one)
        assert path.read_bytes().endswith(b"}\n")
        assert head_of(path).read_text().split()[0] == str(count)


def test_the_line_is_forced_onto_the_disk_before_the_head_knows_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = FileLedger(path)
    heads: list[str] = []
    force = os.fdatasync

    def seen(file: int) -> None:
        heads.append(head_of(path).read_text())
        force(file)

    monkeypatch.setattr("isthmus.privacy.ledger.os.fdatasync", seen)
    ledger.record(RELEASES[0])
    assert [head.split()[0] for head in heads] == ["1"]


def drop_end(lines: list[bytes]) -> list[bytes]:
    return lines[:-2]


def edit(lines: list[bytes]) -> list[bytes]:
    return [*lines[:3], lines[3].replace(b'"clip": 1.5', b'"clip": 2.5'), *lines[4:]]


DAMAGE: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "end cut off": (drop_end, "was truncated"),
    "end cut in mid-line": (lambda lines: [*lines[:-1], lines[-1][:20]], "was truncated"),
    "emptied": (lambda lines: [], "was truncated"),
    "only the first line left": (lambda lines: lines[:1], "was truncated"),
    "edited": (edit, "is broken at entry"),
    "last one edited": (lambda lines: [*lines[:-1], lines[-1].replace(b"896", b"895")], "was edited"),
    "one taken out": (lambda lines: lines[:2] + lines[3:], "is broken at entry"),
    "two exchanged": (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "is broken at entry"),
    "one repeated": (lambda lines: [*lines[:2], lines[1], *lines[2:]], "is broken at entry"),
    "first line gone": (lambda lines: lines[1:], "is broken at entry"),
    "not JSON": (lambda lines: [*lines[:2], b"what?\n", *lines[3:]], "is broken at entry"),
    "not an entry": (lambda lines: [b"[]\n", *lines[1:]], "is broken at entry"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_refused(written: Path, damage: str) -> None:
    change, told = DAMAGE[damage]
    written.write_bytes(b"".join(change(written.read_bytes().splitlines(keepends=True))))
    before = written.read_bytes()
    for read in (reopened, read_ledger):
        with pytest.raises(LedgerError, match=told) as caught:
            read(written)
        assert "restore" in caught.value.remedy
    assert written.read_bytes() == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_no_byte_can_be_changed_unnoticed(written: Path, data: st.DataObject) -> None:
    whole = written.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    written.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
    try:
        with pytest.raises(LedgerError):
            list(read_ledger(written).releases())
    finally:
        written.write_bytes(whole)


HEADS = {
    "empty": "",
    "three words": "4 5 6\n",
    "no number": f"four {GENESIS}\n",
    "none noted": f"0 {GENESIS}\n",
    "fewer than none": f"-1 {GENESIS}\n",
}


@pytest.mark.parametrize("damage", ["gone", *HEADS])
def test_a_head_that_is_gone_or_broken_is_refused(written: Path, damage: str) -> None:
    if damage == "gone":
        head_of(written).unlink()
    else:
        head_of(written).write_text(HEADS[damage])
    with pytest.raises(LedgerError, match=r"the head of|cannot be read"):
        reopened(written)


def test_a_ledger_that_is_gone_is_refused(written: Path) -> None:
    written.unlink()
    with pytest.raises(LedgerError, match="was truncated: 0 of 6 entries are left"):
        reopened(written)


def test_a_ledger_gone_with_its_head_is_refused_where_releases_are_known(written: Path) -> None:
    written.unlink()
    head_of(written).unlink()
    with pytest.raises(LedgerError, match="releases were made"):
        reopened(written, begun=True)


def test_events_of_another_version_are_refused(path: Path) -> None:
    ledger = FileLedger(path)
    ledger._append({"release": release_to_json(release(1)) | {"mechanism": "laplace"}})
    with pytest.raises(LedgerError, match="cannot be accounted"):
        list(ledger.history())


def test_another_silos_ledger_is_refused(written: Path) -> None:
    with pytest.raises(LedgerError, match="of silo 'north', not of 'south'"):
        reopened(written, silo="south")


def test_two_silos_cannot_share_a_ledger(written: Path) -> None:
    first = reopened(written)
    for silo in ("north", "south"):
        with pytest.raises(LedgerTakenError, match="another process") as caught:
            reopened(written, silo=silo)
        assert "own run directory" in caught.value.remedy
    first.record(release(6))
    first.close()
    assert len(list(reopened(written).history())) == 6


OTHER_PROCESS = """
import sys
from pathlib import Path
from isthmus.errors import LedgerTakenError
from isthmus.privacy.ledger import FileLedger
try:
    FileLedger(Path(sys.argv[1]), silo="north", recipe="r1")
except LedgerTakenError as error:
    print("refused:", error)
"""


def test_two_processes_cannot_share_a_ledger_by_whatever_name(written: Path, tmp_path: Path) -> None:
    ledger = reopened(written)
    (tmp_path / "elsewhere").mkdir()
    linked = tmp_path / "elsewhere" / "ledger.jsonl"
    linked.symlink_to(written)
    for path in (written, linked):
        command = [sys.executable, "-c", OTHER_PROCESS, str(path)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        assert told.startswith("refused: another process")
    ledger.record(release(6))
    assert list(read_ledger(written).releases()) == [*RELEASES, release(6)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_cannot_write_its_parents_ledger(written: Path) -> None:
    """A data loader's worker, say: it has the file open, and the lock with it."""
    ledger = reopened(written)
    child = os.fork()
    if not child:
        status = 1
        try:
            ledger.record(release(6))
        except LedgerTakenError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ledger.record(release(6))
    assert list(read_ledger(written).releases()) == [*RELEASES, release(6)]


def test_a_closed_ledger_is_named(written: Path) -> None:
    ledger = reopened(written)
    ledger.close()
    with pytest.raises(LedgerError, match="is closed"):
        ledger.record(release(6))
    assert len(list(read_ledger(written).releases())) == len(RELEASES)


def test_what_is_damaged_while_it_is_written_is_refused_at_the_next_start(written: Path) -> None:
    ledger = reopened(written)
    os.truncate(written, 0)
    ledger.record(release(6))
    ledger.close()
    with pytest.raises(LedgerError, match="is broken at entry"):
        reopened(written)


def test_a_new_ledger_its_head_and_its_folder_are_forced_onto_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a loss of power could leave lines without a head, or no file at all."""
    forced: list[str] = []
    for name in ("fsync", "fdatasync"):
        force = getattr(os, name)

        def seen(file: int, force: Callable[[int], None] = force) -> None:
            forced.append(os.readlink(f"/proc/self/fd/{file}"))
            force(file)

        monkeypatch.setattr(f"isthmus.privacy.ledger.os.{name}", seen)
    FileLedger(path).close()
    assert forced == [str(path), str(head_of(path)), str(path.parent)]


def test_a_ledger_may_be_read_while_another_writes_it(written: Path) -> None:
    ledger = reopened(written)
    ledger.record(release(6))
    assert len(list(read_ledger(written).releases())) == 6


def test_another_recipe_is_noted(written: Path) -> None:
    for recipe in ("r1", "r2", "r2"):
        reopened(written, recipe=recipe).close()
    assert [line["recipe"] for line in read_ledger(written).lines if "recipe" in line] == ["r1", "r2"]


def test_a_clock_behind_the_last_entry_is_noted_and_locks_nobody_out(
    written: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = read_ledger(written).time
    reopened(written, clock=lambda: last - 0.5).close()  # no more than clocks are set by themselves
    assert not caplog.records
    ledger = reopened(written, clock=lambda: last - 7200)
    assert "7200 s behind the last entry" in caplog.text
    before = len(read_ledger(written).lines)
    ledger.record(release(6))
    (line,) = read_ledger(written).lines[before:]
    assert (line["time"], line["behind"]) == (last, pytest.approx(7200, abs=0.01))


def test_a_clock_that_steps_back_while_we_run_is_noted_and_borne(path: Path) -> None:
    times = itertools.chain([100.0, 100.0, 200.0, 150.0, 250.0], itertools.repeat(260.0))
    ledger = FileLedger(path, clock=lambda: next(times))
    for one in RELEASES[:3]:
        ledger.record(one)
    told = [(line["time"], line.get("behind")) for line in read_ledger(path).lines]
    assert told == [(100.0, None), (200.0, None), (200.0, 50.0), (250.0, None)]


def test_no_charge_or_budget_depends_on_the_clock(tmp_path: Path) -> None:
    """The same releases by a good clock, one that stands, and one that runs backwards a day a release."""
    clocks = {"good": itertools.count(1e9), "still": itertools.repeat(1e9), "back": itertools.count(1e9, -86400.0)}
    spent = []
    for name, clock in clocks.items():
        path = tmp_path / name / "ledger.jsonl"
        ledger = FileLedger(path, clock=lambda clock=clock: next(clock))  # type: ignore[misc]
        for one in RELEASES:
            ledger.record(one)
        ledger.close()
        contents = read_ledger(path)
        assert list(contents.releases()) == RELEASES
        times = [line["time"] for line in contents.lines]
        assert times == sorted(times)
        assert any("behind" in line for line in contents.lines) is (name == "back")
        accountant = Accountant(1e-5, contents.releases())
        spent.append((accountant.records, accountant.silo))
    assert spent[0] == spent[1] == spent[2]


@pytest.mark.parametrize("lines", [0, 1])
def test_a_process_that_ended_before_the_first_head_was_written_is_followed_by_another(path: Path, lines: int) -> None:
    FileLedger(path, silo="a").close()
    first = path.read_bytes()
    path.write_bytes(first if lines else b"")
    head_of(path).write_text("")
    ledger = FileLedger(path, silo="a")
    ledger.record(RELEASES[0])
    ledger.close()
    assert list(read_ledger(path).releases()) == RELEASES[:1]


def test_half_a_line_that_the_head_does_not_know_is_dropped(written: Path) -> None:
    with written.open("ab") as file:
        file.write(b'{"seq": 6, "ti')
    ledger = reopened(written)
    assert list(ledger.history()) == RELEASES
    ledger.record(release(6))
    assert list(ledger.history()) == [*RELEASES, release(6)]


def test_whole_lines_that_the_head_does_not_know_count(written: Path) -> None:
    """As after a loss of power: lines are forced onto the disk, the head is not."""
    old = head_of(written).read_text()
    with_more = reopened(written)
    with_more.record(release(6))
    with_more.record(release(7))
    with_more.close()
    head_of(written).write_text(old)
    assert list(reopened(written).history()) == [*RELEASES, release(6), release(7)]


def test_a_crash_between_the_first_line_and_its_head(path: Path) -> None:
    FileLedger(path, silo="north").close()
    head_of(path).unlink()
    ledger = reopened(path, recipe="")
    ledger.record(RELEASES[0])
    assert list(ledger.history()) == RELEASES[:1]


def test_a_full_disk_is_named_and_leaves_the_ledger_whole(written: Path) -> None:
    ledger = reopened(written)
    good = os.dup(ledger._files[0])
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, ledger._files[0])
    with pytest.raises(DiskFullError, match=r"ledger\.jsonl"):
        ledger.record(release(6))
    os.dup2(good, ledger._files[0])
    os.close(good)
    os.close(full)
    ledger.record(release(7))
    assert list(ledger.history()) == [*RELEASES, release(7)]


def test_a_ledger_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskFullError):
        FileLedger(tmp_path / "ledger.jsonl")


def test_a_release_says_that_it_is_an_evaluations_and_an_older_line_that_it_is_not() -> None:
    plain = Release("forward", 1, 3, 8, 1.0, 1.0, 96, charges=(Charge("r", 0.5),))
    assert "evaluation" not in release_to_json(plain)
    for release in (plain, replace(plain, evaluation=True)):
        assert release_from_json(json.loads(json.dumps(release_to_json(release)))) == release
    with pytest.raises(LedgerError, match="cannot be accounted"):
        release_from_json(release_to_json(plain) | {"evaluation": "perhaps"})
