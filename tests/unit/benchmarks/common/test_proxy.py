"""The proxy of the benchmarks: every byte arrives, in order and counted, however long the way and narrow the line."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from benchmarks.common.proxy import CountingProxy, Way

SECONDS = 30.0
WAYS = [(0.0, None), (0.005, None), (0.0, 20e6), (0.005, 20e6)]


class Digester:
    """A server that reads a connection to its end, then answers with the digest of what came and as much of its own."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("localhost", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(accepted,), daemon=True).start()

    def _answer(self, accepted: socket.socket) -> None:
        with closing(accepted):
            came = read_all(accepted)
            accepted.sendall(hashlib.sha256(came).digest() + came[::-1])


def read_all(end: socket.socket) -> bytes:
    pieces = []
    while piece := end.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def exchange(address: str, sent: bytes) -> bytes:
    """Send in pieces of many sizes, end the sending, and read the answer to its end."""
    host, _, port = address.rpartition(":")
    draw, at = random.Random(len(sent)), 0
    with closing(socket.create_connection((host, int(port)), SECONDS)) as end:
        while at < len(sent):
            size = draw.randrange(1, 50_000)
            end.sendall(sent[at : at + size])
            at += size
        end.shutdown(socket.SHUT_WR)
        return read_all(end)


@pytest.fixture
def digester() -> Iterator[Digester]:
    with closing(Digester()) as server:
        yield server


@pytest.mark.parametrize(("delay", "bandwidth"), WAYS)
def test_bytes_arrive_in_order_and_are_counted(delay: float, bandwidth: float | None, digester: Digester) -> None:
    sent = random.Random(0).randbytes(300_000)
    with closing(CountingProxy(digester.address, delay, bandwidth)) as proxy:
        answer = exchange(proxy.address, sent)
        assert answer == hashlib.sha256(sent).digest() + sent[::-1]
        assert (proxy.up, proxy.down) == (len(sent), len(sent) + 32)


def test_connections_side_by_side(digester: Digester) -> None:
    texts = [random.Random(seed).randbytes(20_000 * seed) for seed in range(1, 6)]
    answers: dict[int, bytes] = {}
    with closing(CountingProxy(digester.address, 0.002, 10e6)) as proxy:

        def ask(number: int) -> None:
            answers[number] = exchange(proxy.address, texts[number])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert [answers[number][32:] for number in range(len(texts))] == [text[::-1] for text in texts]
        assert proxy.up == sum(map(len, texts))
        assert proxy.down == proxy.up + 32 * len(texts)


def test_a_line_takes_one_piece_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("benchmarks.common.proxy.time.monotonic", lambda: now)
    way = Way(delay=0.5, bandwidth=1000.0)
    assert [way.arrival(size) for size in (1000, 250, 0)] == [101.5, 101.75, 101.75]
    now = 200.0  # the line has been idle: nothing was saved up
    assert way.arrival(500) == 201.0
    assert way.bytes == 1750
    assert [Way(0.5, None).arrival(size) for size in (10**9, 1)] == [200.5, 200.5]


def test_another_delay_holds_for_what_comes_later(digester: Digester) -> None:
    with closing(CountingProxy(digester.address, 60.0)) as proxy:
        proxy.hold(0.0)
        assert exchange(proxy.address, b"soon")[32:] == b"noos"
