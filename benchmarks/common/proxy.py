"""A TCP proxy on this machine that counts the bytes passing through it, and can hold them back as a long way would.

What it emulates: the time of flight, and a line of limited width. What it does not: losses, and the slow start of TCP
over a long way, since both of its connections stay on this machine.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time

PIECE = 1 << 16
"""Most bytes that are held back as one."""


class Way:
    """One direction: all connections of a proxy share its line, and one count.

    Args:
        delay: seconds that each byte is under way.
        bandwidth: bytes a second that the line takes; None: any number.
    """

    def __init__(self, delay: float, bandwidth: float | None) -> None:
        self.delay = delay
        self.bandwidth = bandwidth
        self.bytes = 0
        self._free = 0.0
        self._lock = threading.Lock()

    def arrival(self, size: int) -> float:
        """When the last of so many bytes, sent now, arrives (``time.monotonic``); they are counted."""
        with self._lock:
            self.bytes += size
            self._free = max(self._free, time.monotonic())
            if self.bandwidth is not None:
                self._free += size / self.bandwidth
            return self._free + self.delay


class CountingProxy:
    """Forwards connections to ``host:port`` and counts what goes up (to it) and down.

    Args:
        delay: seconds that each byte takes, one way.
        bandwidth: bytes a second, each way.
    """

    def __init__(self, address: str, delay: float = 0.0, bandwidth: float | None = None) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._up, self._down = Way(delay, bandwidth), Way(delay, bandwidth)
        self._listener = socket.create_server(("localhost", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def up(self) -> int:
        """Bytes that came from the clients so far."""
        return self._up.bytes

    @property
    def down(self) -> int:
        """Bytes that came from the server so far."""
        return self._down.bytes

    def hold(self, delay: float) -> None:
        """From now on each byte takes this many seconds, one way; those under way come when they were due."""
        self._up.delay = self._down.delay = delay

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for source, sink, way in ((near, far, self._up), (far, near, self._down)):
                    threading.Thread(target=self._pump, args=(source, sink, way), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: Way) -> None:
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._arrive, args=(under_way, sink), daemon=True).start()
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                under_way.put((way.arrival(len(data)), data))
        under_way.put((way.arrival(0), b""))

    def _arrive(self, under_way: queue.SimpleQueue[tuple[float, bytes]], sink: socket.socket) -> None:
        """Hand on what was sent, each piece when its time has come; an empty one is the end."""
        with contextlib.suppress(OSError):
            while (sent := under_way.get())[1]:
                time.sleep(max(0.0, sent[0] - time.monotonic()))
                sink.sendall(sent[1])
            sink.shutdown(socket.SHUT_WR)
