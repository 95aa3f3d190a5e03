"""Letters: what the processes of Flower and those of isthmus hand each other over a socket of one machine.

It needs the standard library alone: every Flower app that ``isthmus flower`` writes holds a copy of this file.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

SOCKET_MODE = 0o660
"""Who may reach a socket: its owner and group."""
_LENGTH = struct.Struct(">Q")
_PAUSE = 0.2
"""Seconds between two looks whether somebody listens."""


class Letter(NamedTuple):
    """What is said in a word or two, and bytes that only the two ends understand."""

    head: Mapping[str, Any]
    """Values that JSON knows."""
    bodies: tuple[bytes, ...] = ()


Answering = Callable[[Letter], Letter]


class Postbox(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Answers letters at a Unix socket while the block runs, each in a thread; at its end those under way are finished.

    Raises:
        OSError: the path is too long, cannot be written, or another process listens there.
    """

    daemon_threads = True
    block_on_close = False  # the threads are waited for here, for so long and no longer
    request_queue_size = 1024

    def __init__(self, path: Path, answer: Answering, *, linger: float = 10.0) -> None:
        self._path, self._answer, self._linger = path, answer, linger
        self._busy = threading.Condition()
        self._open = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(path)
        super().__init__(str(path), _Exchange)
        os.chmod(path, SOCKET_MODE)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), name=f"letters at {self._path}", daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.shutdown()
        self.server_close()
        with suppress(FileNotFoundError):
            self._path.unlink()
        with self._busy:
            self._busy.wait_for(lambda: not self._open, self._linger)

    def answer(self, data: bytes) -> bytes:
        """The answer to the letter in these bytes."""
        with self._busy:
            self._open += 1
        return written(self._answer(read(data)))

    def answered(self) -> None:
        """An answer has gone, or could not be sent."""
        with self._busy:
            self._open -= 1
            self._busy.notify_all()


class _Exchange(socketserver.BaseRequestHandler):
    """One letter and its answer."""

    server: Postbox

    def handle(self) -> None:
        with suppress(OSError):  # who asked is gone
            data = _receive(self.request)
            try:
                _send(self.request, self.server.answer(data))
            finally:
                self.server.answered()


def ask(path: str | Path, letter: Letter, *, patience: float = 0.0) -> Letter:
    """The answer to a letter, of the process that listens at this socket. One that ends before it has answered gets the
    letter again when it is back.

    Args:
        patience: seconds for which to wait for a process there.

    Raises:
        OSError: nobody has answered there.
    """
    data, end = written(letter), time.monotonic() + patience
    while True:
        with socket.socket(socket.AF_UNIX) as line:
            try:
                line.connect(str(path))
                _send(line, data)
                return read(_receive(line))
            except OSError:
                if time.monotonic() >= end:
                    raise
        time.sleep(_PAUSE)


def written(letter: Letter) -> bytes:
    """A letter as bytes: its head in a line of JSON, then its bodies."""
    head = json.dumps([letter.head, [len(body) for body in letter.bodies]]).encode()
    return b"".join((head, b"\n", *letter.bodies))


def read(data: bytes) -> Letter:
    """The letter in these bytes.

    Raises:
        ValueError: they are none.
    """
    line, _, rest = data.partition(b"\n")
    head, sizes = json.loads(line)
    if not isinstance(head, dict) or sum(sizes) != len(rest):
        raise ValueError("not a letter")
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return Letter(head, tuple(rest[end - size : end] for end, size in zip(ends, sizes, strict=True)))


def _send(line: socket.socket, data: bytes) -> None:
    line.sendall(_LENGTH.pack(len(data)) + data)


def _receive(line: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(line, _LENGTH.size))
    return _exactly(line, length)


def _exactly(line: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = line.recv(min(length - len(data), 2**20))
        if not part:
            raise ConnectionResetError("the other process ended before it answered")
        data += part
    return bytes(data)


def _remove_dead(path: Path) -> None:
    """Remove the socket that an ended process left. Raises ``OSError`` if one listens there, or it is another file."""
    if not path.exists():
        return
    if not path.is_socket():
        raise FileExistsError(f"{path} is no socket")
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise FileExistsError(f"another process listens at {path}")
