"""Ports of this machine that nobody uses."""

from __future__ import annotations

import socket
from contextlib import ExitStack


def free_ports(count: int) -> list[int]:
    """So many different ones."""
    with ExitStack() as taken:
        return [taken.enter_context(socket.create_server(("localhost", 0))).getsockname()[1] for _ in range(count)]


def free_port() -> int:
    return free_ports(1)[0]
