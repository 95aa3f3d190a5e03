"""A generator in a fresh process: what it yields arrives, also what came before it was killed; so do its errors."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from isthmus.engines.fresh import in_fresh_process
from isthmus.errors import DataError, RunError


def counting(last: int, end: str) -> Iterator[tuple[int, int]]:
    for number in range(last):
        yield number, os.getpid()
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "out of memory":
        raise MemoryError
    if end == "refused":
        raise DataError("no rows", remedy="add rows")
    if end == "broken":
        raise ValueError("broken")


@pytest.mark.process
@pytest.mark.parametrize("end", ["done", "killed", "out of memory"])
def test_what_there_was_before_a_process_ran_out_of_memory_is_kept(end: str) -> None:
    found = list(in_fresh_process(counting, 2, end))
    assert [number for number, _ in found] == [0, 1]
    assert {pid for _, pid in found}.isdisjoint({os.getpid()})


@pytest.mark.process
def test_an_error_in_the_process_is_raised_here(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no rows") as refused:
        list(in_fresh_process(counting, 1, "refused"))
    assert refused.value.remedy == "add rows"
    with pytest.raises(RunError, match="exit code 1"):
        list(in_fresh_process(counting, 1, "broken"))
    assert "ValueError: broken" in capfd.readouterr().err


@pytest.mark.process
def test_a_process_that_is_no_longer_wanted_ends() -> None:
    process = in_fresh_process(counting, 10**9, "done")
    _, pid = next(process)
    process.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
