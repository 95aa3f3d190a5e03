"""The end of a process: by a signal, or when the engine that started it is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENGINE = "ISTHMUS_ENGINE"
"""Environment variable: process id of the engine that started this process."""
WATCH_SECONDS = 0.5
"""Time between two checks that the engine still runs."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. It is a ``BaseException``, so that handlers of errors do not catch it."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block, the first SIGTERM or SIGINT raises ``Stopped`` in the main thread; later ones are ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Engine:
    started = False


def by_engine() -> bool:
    """Whether an engine started this process. The engine holds the run directory's lock then."""
    return _Engine.started


def end_with_engine() -> None:
    """If an engine started this process, send SIGTERM to this process as soon as the engine has ended."""
    engine = os.environ.pop(ENGINE, None)
    if engine is not None:
        _Engine.started = True
        threading.Thread(target=_follow, args=(int(engine),), name="engine watch", daemon=True).start()


def _follow(engine: int) -> None:
    while os.getppid() == engine:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
