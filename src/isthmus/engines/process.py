"""One role as a child process of the local engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from io import FileIO
from pathlib import Path

from isthmus.engines.lifetime import ENGINE
from isthmus.errors import IsthmusError, PeerGoneError, RunError
from isthmus.storage.files import PRIVATE, disk_errors, private_folder

LISTENING = "listening at "
"""First words of the line that a server prints when it is ready; ``host:port`` follows."""
LAST_LINES = 40
"""Lines of output that are kept in memory."""
STOP_SECONDS = 10.0
"""Time that a process has to end after SIGTERM."""


class RoleProcess:
    """A role of a run in a child process.

    Its output is appended to a log file. The last lines are also kept in memory, because a full disk holds no log. The
    process has a session of its own, so that Ctrl-C reaches it only through the engine. It ends when the engine ends.

    Args:
        title: the process's name in messages, such as ``silo clinic``.
        arguments: command-line arguments of ``isthmus``.
        log: file for standard output and standard error.
        inherited: file descriptors that the process inherits.
    """

    def __init__(self, title: str, arguments: list[str], log: Path, inherited: tuple[int, ...] = ()) -> None:
        self.title = title
        self._log = log
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._address: Future[str] = Future()
        with disk_errors(log):
            private_folder(log.parent)
            output = os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE), "ab", buffering=0)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "isthmus", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=inherited,
            env={**os.environ, ENGINE: str(os.getpid()), "PYTHONIOENCODING": "utf-8"},  # as the log and its reader
        )
        self._reader = threading.Thread(target=self._read, args=(output,), name=f"log of {title}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.poll()

    def wait_listening(self, seconds: float) -> str:
        """Wait until the server in the process is ready; returns its address as ``host:port``.

        Args:
            seconds: longest time to wait.

        Raises:
            RunError: the process ended first.
            PeerGoneError: the time is over.
        """
        try:
            return self._address.result(seconds)
        except TimeoutError:
            raise PeerGoneError(
                f"{self.title} did not start within {seconds:.0f} s", remedy=f"see {self._log}"
            ) from None

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def end(self, seconds: float) -> None:
        """Wait for the process to end, and kill it after this many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def failure(self) -> IsthmusError:
        """An error for a process that has ended: the last error that it printed, else its exit code or signal."""
        self._reader.join()
        return self._failure()

    def _failure(self) -> IsthmusError:
        lines = list(self._last)
        starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        if starts:
            message = lines[starts[-1]].removeprefix("error: ")
            remedies = [line.strip() for line in lines[starts[-1] + 1 :] if line.strip().startswith("remedy: ")]
            remedy = remedies[0].removeprefix("remedy: ") if remedies else f"see {self._log}"
            return RunError(f"{self.title} failed: {message}", remedy=remedy)
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return RunError(f"{self.title} {how}", remedy=f"see {self._log}, then continue with 'isthmus run --resume'")

    def _read(self, log: FileIO) -> None:
        """Copy the process's output to the log, and set the address when the process prints it."""
        assert self._process.stdout is not None
        with log, self._process.stdout as output:
            for raw in output:
                with suppress(OSError):
                    log.write(raw)
                line = raw.decode(errors="replace").rstrip()
                self._last.append(line)
                if line.startswith(LISTENING) and not self._address.done():
                    self._address.set_result(line.removeprefix(LISTENING))
        if not self._address.done():
            self._address.set_exception(self._failure())


def stop(*processes: RoleProcess) -> None:
    """End these processes: SIGTERM to all, then SIGKILL to those that run after ``STOP_SECONDS``."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + STOP_SECONDS
    for process in processes:
        process.end(max(0.1, end - time.monotonic()))
