"""How long a process of ours lives: until a signal, or as long as the engine that started it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENGINE = "ISTHMUS_ENGINE"
"""Environment variable with the process id of the engine that started a role, which must not outlive it."""
POLL_SECONDS = 0.5


class Stopped(BaseException):
    """The process was asked to stop (SIGINT or SIGTERM). No handler of errors, or of typer's, takes it for one."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT raise ``Stopped`` in the main thread, once."""

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


def end_with_engine() -> None:
    """If an engine started this process, have it stop (as by SIGTERM) soon after the engine is gone."""
    engine = os.environ.pop(ENGINE, None)
    if engine is not None:
        threading.Thread(target=_follow, args=(int(engine),), name="engine watch", daemon=True).start()


def _follow(engine: int) -> None:
    while os.getppid() == engine:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
