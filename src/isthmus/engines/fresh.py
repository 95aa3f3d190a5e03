"""A function in a fresh process: what it takes of memory is its own, and it may be killed for it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from isthmus.errors import IsthmusError, RunError


def in_fresh_process(function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    """What a generator yields in a new process. It ends early if that process is killed or has no more memory.

    Raises:
        IsthmusError: the generator's own.
        RunError: another error in it; its traceback is on standard error.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            try:
                result = ours.recv()
            except EOFError:
                break
            if isinstance(result, IsthmusError):
                raise result
            yield result
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RunError(f"measuring ended with exit code {process.exitcode}", remedy="see the error before this one")
    finally:
        process.kill()
        process.join()


def _send(connection: Connection, function: Callable[..., Iterator[Any]], arguments: Sequence[Any]) -> None:
    """In the new process: send what the generator yields, or its error, as long as somebody reads it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    try:
        for one in function(*arguments):
            connection.send(one)
    except IsthmusError as error:
        connection.send(error)
    except BrokenPipeError:
        pass
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
    finally:
        connection.close()
