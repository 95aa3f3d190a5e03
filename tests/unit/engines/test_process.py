"""A role's process: where it listens, what it said last, how it ended. A small program stands in for the command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isthmus.engines import process
from isthmus.engines.lifetime import ENGINE
from isthmus.engines.process import RoleProcess, stop
from isthmus.errors import PeerGoneError, RunError

Start = Callable[[str], RoleProcess]
WAIT = 60.0
FOREVER = "import time; time.sleep(600)"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts this Python text in place of ``isthmus``."""
    interpreter = tmp_path / "interpreter"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S -c "$3"\n')  # after -m isthmus
    interpreter.chmod(0o755)
    started: list[RoleProcess] = []

    def begin(program: str) -> RoleProcess:
        monkeypatch.setattr(sys, "executable", str(interpreter))
        try:
            started.append(RoleProcess("silo clinic", [program], tmp_path / "logs" / "clinic.log"))
        finally:
            monkeypatch.undo()
        return started[-1]

    yield begin
    for one in started:
        one.terminate()
        one.end(WAIT)


def test_it_tells_where_it_listens_and_keeps_its_output(start: Start, tmp_path: Path) -> None:
    role = start(f"print('hello'); print('listening at localhost:7001', flush=True); {FOREVER}")
    assert role.wait_listening(WAIT) == "localhost:7001"
    assert role.poll() is None
    assert (tmp_path / "logs" / "clinic.log").read_text() == "hello\nlistening at localhost:7001\n"


def test_it_knows_its_engine_and_is_in_a_session_of_its_own(start: Start, tmp_path: Path) -> None:
    role = start(f"import os; print(os.environ['{ENGINE}'], os.getsid(0) == os.getpid())")
    role.end(WAIT)
    assert (tmp_path / "logs" / "clinic.log").read_text().split() == [str(os.getpid()), "True"]


def test_its_own_last_error_and_remedy_are_the_failure(start: Start) -> None:
    role = start("print('error: no such file'); print('  remedy: name another'); raise SystemExit(1)")
    role.end(WAIT)
    assert role.poll() == 1
    failure = role.failure()
    assert isinstance(failure, RunError)
    assert (failure.message, failure.remedy) == ("silo clinic failed: no such file", "name another")


def test_an_error_without_a_remedy_points_at_the_log(start: Start, tmp_path: Path) -> None:
    role = start("print('error: no such file'); raise SystemExit(1)")
    role.end(WAIT)
    assert role.failure().remedy == f"see {tmp_path / 'logs' / 'clinic.log'}"


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
    ],
)
def test_without_an_error_of_its_own_the_failure_says_how_it_ended(start: Start, end: str, how: str) -> None:
    role = start(end)
    role.end(WAIT)
    assert role.failure().message == f"silo clinic {how}"
    assert "isthmus run --resume" in role.failure().remedy


def test_a_server_that_ends_before_it_listens_is_its_failure(start: Start) -> None:
    with pytest.raises(RunError, match="silo clinic failed: in use"):
        start("print('error: in use'); raise SystemExit(1)").wait_listening(WAIT)


def test_a_server_that_never_listens_is_named(start: Start) -> None:
    with pytest.raises(PeerGoneError, match="silo clinic did not start within 0 s"):
        start(FOREVER).wait_listening(0.01)


def test_stopping_kills_who_does_not_end_by_itself(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = start(f"import signal; signal.signal(15, signal.SIG_IGN); print('listening at x', flush=True); {FOREVER}")
    deaf.wait_listening(WAIT)
    monkeypatch.setattr(process, "STOP_SECONDS", 0.1)
    stop(deaf)
    assert deaf.poll() == -9
