"""A process of ours ends at a signal, once, and not later than the engine that started it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from isthmus.engines import lifetime
from isthmus.engines.lifetime import ENGINE, Stopped, end_with_engine, stoppable


@pytest.fixture
def kept_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test finds of an engine ends with the test."""
    monkeypatch.setattr(lifetime._Engine, "started", False)


@pytest.mark.usefixtures("kept_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_block_and_a_second_one_does_not_disturb_its_end(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def stopped_twice() -> None:
        with stoppable():
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)  # ignored: the block is ending already

    with pytest.raises(Stopped):
        stopped_twice()
    assert signal.getsignal(number) is before


def test_no_handler_of_errors_takes_it_for_one() -> None:
    assert not issubclass(Stopped, Exception)


def test_a_process_whose_engine_is_gone_asks_itself_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(lifetime.os, "kill", lambda process, number: (told.append((process, number)), asked.set()))
    monkeypatch.setenv(ENGINE, str(os.getppid() + 1))  # another than this process has
    end_with_engine()
    assert asked.wait(60)
    assert told == [(os.getpid(), signal.SIGTERM)]
    assert ENGINE not in os.environ, "processes started later would follow an engine that did not start them"


def test_without_an_engine_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE, raising=False)
    before = {*threading.enumerate()}
    end_with_engine()
    assert {*threading.enumerate()} <= before  # others' threads may end


def test_an_engine_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE, "engine")
    with pytest.raises(ValueError, match="engine"):
        end_with_engine()
