"""Addresses of servers, ``host:port``."""

from __future__ import annotations

import ipaddress
import re

from isthmus.errors import RecipeError

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


class NoAddress(ValueError):  # noqa: N818 (a complaint for pydantic, whose message is what was expected)
    """A recipe's value is no address."""


def address_problem(address: str, *, any_port: bool = False) -> str | None:
    """What is wrong with an address, after the word "expected"; None: nothing.

    Args:
        any_port: whether port 0 is allowed, with which a server chooses a free one.
    """
    if re.search(r"\s", address):
        return "host:port without spaces"
    if "://" in address:
        return f"host:port without {address.partition('://')[0]}://, such as 'example.org:7001'"
    host, colon, port = address.rpartition(":")
    bracketed = address.startswith("[")
    if bracketed and not address.endswith("]") and "]:" in address:
        return _bad_v6(host) or _bad_port(port, any_port)
    if bracketed or _is_v6(address):
        return f"host:port, with an IPv6 address in brackets, such as '[{address.strip('[]')}]:7001'"
    if not colon:
        return f"host:port, such as '{address or 'example.org'}:7001'"
    if not host:
        return f"host:port with a host, such as 'example.org:{port}', or '0.0.0.0:{port}' to listen everywhere"
    if not _HOST.fullmatch(host):
        return "host:port with a host of letters, digits, '.', '-' and '_'"
    return _bad_port(port, any_port)


def checked_address(address: str, *, any_port: bool = False) -> str:
    """The address itself.

    Args:
        any_port: as of ``address_problem``.

    Raises:
        RecipeError: it is none.
    """
    if problem := address_problem(address, any_port=any_port):
        raise RecipeError(f"the address {address!r}: expected {problem}", remedy="correct this address")
    return address


def is_loopback(address: str) -> bool:
    """Whether this ``host:port`` is on this machine, by its name alone."""
    host = address.rpartition(":")[0].strip("[]").lower().removesuffix(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    return found.is_loopback or found.is_unspecified


def _bad_v6(host: str) -> str | None:
    return None if _is_v6(host.strip("[]")) else "an IPv6 address in the brackets"


def _is_v6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def _bad_port(port: str, any_port: bool) -> str | None:
    if port.isascii() and port.isdigit() and (any_port or int(port)) and int(port) < 2**16:
        return None
    return "a port from 1 to 65535 after the host's colon"
