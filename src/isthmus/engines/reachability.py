"""Whether a party reaches its servers: names, ports, proxies, TLS, what both must have alike, and their clocks."""

from __future__ import annotations

import base64
import datetime
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from cryptography import x509

from isthmus.errors import CutMovedError, IsthmusError
from isthmus.joining.keeper import CONTACT
from isthmus.recipe import Recipe
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.client import GrpcChannel, proxy_for, proxy_note
from isthmus.wire.identity import Identity, Role, common_name
from isthmus.wire.server import AUTHORITY

REACH_LIMIT = 10.0
"""Seconds to wait for a connection, a handshake or an answer."""
PINGS = 5
"""Round trips of which the fastest counts."""
CLOCK_SECONDS = 60.0
"""Difference of two clocks that is worth a warning."""
_NOT_YET, _EXPIRED, _OTHER_NAME = 9, 10, 62
"""OpenSSL's numbers of what is wrong with a certificate."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    """What was checked, in a word or two."""
    state: Literal["ok", "warning", "failed"]
    words: str
    remedy: str = ""
    """What the reader can do about it."""


@dataclass(frozen=True)
class ServerPlace:
    """A server that a party connects to."""

    name: str
    """On its certificate."""
    address: str
    service: str

    @property
    def title(self) -> str:
        """What it is to the party."""
        return "authority" if self.service == AUTHORITY else self.name


@dataclass(frozen=True)
class Reached:
    """What was found of a server."""

    place: ServerPlace
    findings: tuple[Finding, ...]
    pong: pb.Pong | None = None
    """Its answer, if recipes and models are alike."""


def servers_of(recipe: Recipe, name: str, role: Role) -> list[ServerPlace]:
    """The servers that a party connects to; a silo's first one is the trunk."""
    places = []
    if role == "silo":
        trunks = (recipe.trunk.address, *recipe.trunk.replicas)
        places = [ServerPlace("trunk", address, "Trunk") for address in trunks]
    if role in ("silo", "edge"):
        parent = recipe.tree.parent(name)
        for server in filter(None, (parent, recipe.tree.sibling(parent))):
            places.append(ServerPlace(server, recipe.tree.node(server).address, "Root"))
    contact = Path(recipe.wire.certificates) / name / CONTACT
    if contact.exists():
        told = json.loads(contact.read_text(encoding="utf-8"))
        if (told["server"], told["address"]) not in {(one.name, one.address) for one in places}:
            places.append(ServerPlace(told["server"], told["address"], AUTHORITY))
    return places


def reach(recipe: Recipe, place: ServerPlace, name: str, role: Role, hello: pb.Hello | None) -> Reached:
    """Check one server, step by step, up to the first that fails.

    Args:
        name, role: the party's, whose certificate is valid.
        hello: what it would greet with; None: nothing is compared.
    """
    identity, findings = Identity.load(Path(recipe.wire.certificates), name, role), []
    pong = None
    for finding in _steps(recipe, place, identity, role, hello):
        if isinstance(finding, pb.Pong):
            pong = finding
        else:
            findings.append(finding)
    return Reached(place, tuple(findings), pong)


def open_channel(recipe: Recipe, place: ServerPlace, name: str, role: Role) -> GrpcChannel:
    """A channel that greets with a ping: whatever of this party is connected stays so.

    Raises:
        IsthmusError: the server cannot be reached, or does not accept the party.
    """
    identity, waits = Identity.load(Path(recipe.wire.certificates), name, role), recipe.waits
    limit = min(REACH_LIMIT, waits.reach)
    return GrpcChannel(
        place.address,
        place.service,
        identity,
        server=place.name,
        visits=True,
        deadline=limit,
        answer_deadline=waits.answer,
        limit=recipe.wire.max_frame_bytes,
    )


def connection(address: str) -> tuple[socket.socket, str]:
    """A TCP connection to this address, through a proxy if the environment names one, and how it was made, in words.

    Raises:
        ConnectionProblem: there is none.
    """
    proxy = proxy_for(address)
    host, _, port = address.rpartition(":")
    if proxy is None:
        return _connected(host.strip("[]"), int(port), address), f"connects{proxy_note(address)}"
    url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    there = f"the proxy {url.hostname}:{url.port or 443}"
    opened = _connected(url.hostname or "", url.port or 443, there)
    try:
        _tunnel(opened, url, address, there)
    except BaseException:
        opened.close()
        raise
    return opened, f"connects{proxy_note(address)}"


class ConnectionProblem(Exception):  # noqa: N818 (a finding in the making)
    """No connection, and what can be done about it."""

    def __init__(self, words: str, remedy: str) -> None:
        super().__init__(words)
        self.words, self.remedy = words, remedy


def shown_certificate(address: str, authority: bytes | None = None, name: str = "") -> x509.Certificate:
    """The certificate that a server shows.

    Args:
        authority: PEM certificates that it must be signed by; None: it is not checked.
        name: the name that it must be for.

    Raises:
        ConnectionProblem: there is no connection, no TLS, or the certificate is not valid.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if authority is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=authority.decode("ascii", "ignore"))
    opened, _ = connection(address)
    try:
        with context.wrap_socket(opened, server_hostname=name or None) as secured:
            return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    except ssl.SSLCertVerificationError as error:
        raise _distrust(address, name, error) from error
    except (OSError, ValueError) as error:  # ssl.SSLError is one of the first
        raise ConnectionProblem(
            f"{address} answers, but not as a server of isthmus does ({_reason(error)})",
            "correct the address in the recipe; if something between opens TLS, it must let this address pass",
        ) from error
    finally:
        opened.close()


def clock_finding(place: ServerPlace, difference: float, identity: Identity) -> Finding:
    """What to say of two clocks.

    Args:
        difference: seconds that the server's is ahead of this machine's.
    """
    own = x509.load_pem_x509_certificates(identity.certificate)[0]
    there = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=difference)
    check = f"clock of {place.title}"
    words = f"{abs(difference):,.0f} s {'ahead of' if difference > 0 else 'behind'} this machine's"
    remedy = "set both clocks by a time server (NTP)"
    if not own.not_valid_before_utc <= there <= own.not_valid_after_utc:
        return Finding(check, "failed", f"{words}; by it this party's certificate is not valid", remedy)
    if abs(difference) > CLOCK_SECONDS:
        return Finding(check, "warning", words, remedy)
    return Finding(check, "ok", f"within {max(1.0, abs(difference)):,.0f} s of this machine's")


def _steps(
    recipe: Recipe, place: ServerPlace, identity: Identity, role: Role, hello: pb.Hello | None
) -> Iterator[Finding | pb.Pong]:
    try:
        opened, how = connection(place.address)
        opened.close()
        yield Finding(place.title, "ok", f"{place.address} {how}")
        shown_certificate(place.address, identity.authority, place.name)
        yield Finding(f"{place.title}, TLS", "ok", "its certificate is of this federation, valid now")
    except ConnectionProblem as problem:
        yield Finding(place.title, "failed", problem.words, problem.remedy)
        return
    try:
        with closing(open_channel(recipe, place, identity.name, role)) as channel:
            yield from _greeted(channel, place, identity, hello)
    except IsthmusError as error:
        yield Finding(f"{place.title}, greeting", "failed", error.message, error.remedy)


def _greeted(
    channel: GrpcChannel, place: ServerPlace, identity: Identity, hello: pb.Hello | None
) -> Iterator[Finding | pb.Pong]:
    trip = min(_round_trip(channel) for _ in range(PINGS))
    yield Finding(f"{place.title}, answer", "ok", f"accepts this party's certificate; round trip {1e3 * trip:,.1f} ms")
    if hello is None or place.service == AUTHORITY:
        return
    started = time.time()
    try:
        pong: pb.Pong = channel.call(pb.Ping(compared=hello))
    except CutMovedError as moved:  # no fault of a party that starts now
        yield Finding(f"{place.title}, recipe", "warning", moved.message, moved.remedy)
        return
    middle = (started + time.time()) / 2
    if not pong.time:
        words = f"{place.name} runs an earlier version, which compares nothing before a run"
        yield Finding(f"{place.title}, recipe", "warning", words, "run the same version of isthmus on both sides")
        return
    alike = "recipe and model" if place.service == "Trunk" else "recipe and the model's configuration"
    yield Finding(f"{place.title}, recipe", "ok", f"{alike} are alike on both sides")
    yield clock_finding(place, pong.time - middle, identity)
    yield pong


def _round_trip(channel: GrpcChannel) -> float:
    started = time.perf_counter()
    channel.call(pb.Ping())
    return time.perf_counter() - started


def _connected(host: str, port: int, title: str) -> socket.socket:
    try:
        return socket.create_connection((host, port), REACH_LIMIT)
    except socket.gaierror as error:
        raise ConnectionProblem(
            f"the name {host} is not known here ({error.strerror})",
            "correct the address in the recipe, or ask the network's administrator for the name",
        ) from error
    except ConnectionRefusedError as error:
        raise ConnectionProblem(
            f"nothing listens at {title}", "start the server; if it runs, correct the port in the recipe"
        ) from error
    except TimeoutError as error:
        raise ConnectionProblem(
            f"{title} does not answer within {REACH_LIMIT:.0f} s",
            f"let this machine's firewall and those between pass outgoing TCP to port {port}",
        ) from error
    except OSError as error:
        raise ConnectionProblem(
            f"{title} cannot be reached ({error.strerror or error})",
            f"check the network; outgoing TCP to port {port} must pass",
        ) from error


def _tunnel(opened: socket.socket, url: SplitResult, address: str, there: str) -> None:
    """Ask a proxy for a connection, as gRPC does."""
    lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
    if url.username:
        secret = f"{unquote(url.username)}:{unquote(url.password or '')}"
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(secret.encode()).decode()}")
    try:
        opened.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        head = b""
        while b"\r\n\r\n" not in head and len(head) < 2**16 and (piece := opened.recv(1)):
            head += piece
    except OSError as error:
        raise ConnectionProblem(
            f"{there} does not answer ({_reason(error)})", "ask the proxy's administrator"
        ) from error
    status = head.partition(b"\r\n")[0].decode("ascii", "replace").partition(" ")[2][:80]
    if status.startswith("407"):
        given = "refuses the name and password that the environment gives" if url.username else "wants credentials"
        raise ConnectionProblem(
            f"{there} {given} (407)",
            "write them into the variable: http_proxy=http://NAME:PASSWORD@HOST:PORT; gRPC knows Basic alone",
        )
    if not status.startswith("200"):
        raise ConnectionProblem(
            f"{there} does not connect to {address} ({status or 'no answer'})",
            "ask its administrator to let CONNECT to this address pass, or name the host in no_proxy",
        )


def _distrust(address: str, name: str, error: ssl.SSLCertVerificationError) -> ConnectionProblem:
    """What is wrong with a server's certificate, in words."""
    shown = shown_certificate(address)
    now, begin, end = datetime.datetime.now(datetime.UTC), shown.not_valid_before_utc, shown.not_valid_after_utc
    clock = f"it is {now:%Y-%m-%d %H:%M} UTC by this machine's clock"
    if error.verify_code == _NOT_YET:
        return ConnectionProblem(
            f"the certificate of {name} is valid from {begin:%Y-%m-%d %H:%M} UTC on, and {clock}",
            "set this machine's clock right; if it is, the clock of who made the certificate is wrong",
        )
    if error.verify_code == _EXPIRED:
        return ConnectionProblem(
            f"the certificate of {name} expired on {end:%Y-%m-%d %H:%M} UTC, and {clock}",
            f"if the clock is right, {name} needs a new certificate: 'isthmus invite {name}'",
        )
    if error.verify_code == _OTHER_NAME:
        return ConnectionProblem(
            f"the server at {address} is {common_name(shown) or 'without a name'}, {name} is needed",
            "correct the address in the recipe, or give the server a certificate with that name",
        )
    return ConnectionProblem(
        f"the certificate at {address} is of another authority: another federation, or something between opens TLS",
        "correct the address; a firewall that inspects TLS must let it pass as it is; else ask for a new invite",
    )


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)[:80]
