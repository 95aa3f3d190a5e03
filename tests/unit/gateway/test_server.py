"""Where the gateway listens. The whole process: ``tests/integration/test_gateway.py``."""

from __future__ import annotations

import socket

import pytest

from isthmus.errors import RunError
from isthmus.gateway.server import bound, http_server, url_of
from tests.unit.gateway.test_guard import echo


def test_a_free_port_is_taken_and_named() -> None:
    with bound("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert url_of(listening) == f"http://127.0.0.1:{port}/v1"
        with pytest.raises(RunError, match=f"cannot listen at 127.0.0.1:{port}") as found, bound("127.0.0.1", port):
            pass
        assert "--port" in found.value.remedy


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "not a host"])
def test_hosts_that_are_not_here(host: str) -> None:
    with pytest.raises(RunError, match="cannot listen"), bound(host, 0):
        pass


def test_an_application_is_served_from_another_thread() -> None:
    with bound("localhost", 0) as listening, http_server(echo, listening):
        with socket.create_connection(listening.getsockname()[:2], timeout=30) as connection:
            connection.sendall(
                b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
            )
            answer = b""
            while piece := connection.recv(4096):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"hi\r\n0\r\n\r\n")
