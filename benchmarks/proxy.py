"""A TCP proxy on this machine that counts the bytes passing through it, and can hold them back as a long way would."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time


class CountingProxy:
    """Forwards connections to ``host:port`` and counts what goes up (to it) and down.

    Args:
        delay: seconds that each byte takes, one way.
    """

    def __init__(self, address: str, delay: float = 0.0) -> None:
        self._delay = delay
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self.up = 0
        self.down = 0
        self._listener = socket.create_server(("localhost", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                for source, sink, upward in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pump, args=(source, sink, upward), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, upward: bool) -> None:
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._arrive, args=(under_way, sink), daemon=True).start()
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if upward:
                    self.up += len(data)
                else:
                    self.down += len(data)
                under_way.put((time.monotonic() + self._delay, data))
        under_way.put((time.monotonic() + self._delay, b""))

    def _arrive(self, under_way: queue.SimpleQueue[tuple[float, bytes]], sink: socket.socket) -> None:
        """Hand on what was sent, each piece when its time has come; an empty one is the end."""
        with contextlib.suppress(OSError):
            while (sent := under_way.get())[1]:
                time.sleep(max(0.0, sent[0] - time.monotonic()))
                sink.sendall(sent[1])
            sink.shutdown(socket.SHUT_WR)
