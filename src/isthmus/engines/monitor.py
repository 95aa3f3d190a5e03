"""What a server role tells those who run it, over HTTP: ``/healthz`` for probes, ``/metrics`` for Prometheus.

No text, no tensor and no message of an error of a request is here: names of parties, kinds of requests, counts.
"""

from __future__ import annotations

import json
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import PROCESS_COLLECTOR, CollectorRegistry, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

import isthmus
from isthmus.errors import IsthmusError, RecipeError
from isthmus.wire.server import Server
from isthmus.wire.traffic import PeerTraffic
from isthmus.wire.vitals import Vitals, Watched

log = logging.getLogger(__name__)
THREADS = 4
"""Requests that are answered at a time."""
REQUEST_SECONDS = 5.0
"""Time for which the rest of a request is waited for."""
Environ = Mapping[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class Monitor:
    """Answers ``GET /healthz`` and ``GET /metrics``, from before the role can serve until its process ends.

    ``/healthz`` is one JSON object: ``status`` (``starting``, ``ok`` or ``failed``), ``role``, and for each service
    its state, completed rounds and the parties that it waits for. It is 200 where the status is ``ok``, else 503. A
    service that waits for parties is well. There is no authentication: listen where only the role's operators have
    access.

    Args:
        role: what the process is, as ``trunk``.
        address: ``host:port`` to listen at; port 0 chooses a free port.

    Raises:
        RecipeError: this is no ``host:port``.
        IsthmusError: the host is unknown, or the port is in use.
    """

    def __init__(self, role: str, address: str) -> None:
        self._role = role
        self._server: Server | None = None
        self._services: Mapping[str, Watched] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._registry.register(PROCESS_COLLECTOR)
        self._pages = {"/healthz": self._healthz, "/metrics": self._metrics}
        self._http = _listen(address)
        self._http.set_app(self._answer)
        self.port: int = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, name="monitor", daemon=True).start()

    def watch(self, server: Server, services: Mapping[str, object]) -> None:
        """The role serves now: tell of this server and of those of its services that say how they are."""
        self._services = {name: one for name, one in services.items() if isinstance(one, Watched)}
        self._server = server

    def close(self) -> None:
        """Stop listening."""
        self._http.shutdown()
        self._http.server_close()

    def collect(self) -> Iterator[Metric]:
        """The metrics now; called by Prometheus' registry."""
        yield InfoMetricFamily("isthmus", "This process", value={"version": isthmus.__version__, "role": self._role})
        yield from _of_services({name: one.vitals() for name, one in self._services.items()})
        if self._server is not None:
            yield from _of_peers(self._server.traffic())
            expiry = GaugeMetricFamily("isthmus_certificate_expiry_timestamp_seconds", "End of the own certificate")
            expiry.add_metric([], self._server.expires.timestamp())
            yield expiry

    def _answer(self, environ: Environ, start: StartResponse) -> list[bytes]:
        page = self._pages.get(environ["PATH_INFO"])
        if page is None:
            status, kind, body = "404 Not Found", "text/plain", b"there are /healthz and /metrics\n"
        elif environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, kind, body = "405 Method Not Allowed", "text/plain", b"this is read by GET\n"
        else:
            status, kind, body = page()
        start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _healthz(self) -> tuple[str, str, bytes]:
        vitals = {name: one.vitals() for name, one in self._services.items()}
        failed = any(one.failure for one in vitals.values())
        status = "starting" if self._server is None else "failed" if failed else "ok"
        services = {name.lower(): _as_json(one) for name, one in vitals.items()}
        body = json.dumps({"status": status, "role": self._role, "services": services}) + "\n"
        code = "200 OK" if status == "ok" else "503 Service Unavailable"
        return code, "application/json", body.encode()

    def _metrics(self) -> tuple[str, str, bytes]:
        return "200 OK", exposition.CONTENT_TYPE_PLAIN_0_0_4, exposition.generate_latest(self._registry)


@contextmanager
def monitored(role: str, address: str | None) -> Iterator[Monitor | None]:
    """Within the block, a monitor at this address; none if there is no address."""
    if address is None:
        yield None
        return
    monitor = Monitor(role, address)
    where = f"http://{address.rpartition(':')[0]}:{monitor.port}"
    log.info("%s/healthz and %s/metrics are answered", where, where, extra={"metrics": f"{where}/metrics"})
    try:
        yield monitor
    finally:
        monitor.close()


def _as_json(vitals: Vitals) -> dict[str, object]:
    state: dict[str, object] = {"state": vitals.state, "completed": vitals.completed, "missing": list(vitals.missing)}
    return state | ({"failure": vitals.failure} if vitals.failure else {})


def _of_services(vitals: Mapping[str, Vitals]) -> Iterator[Metric]:
    completed = GaugeMetricFamily("isthmus_completed_rounds", "Rounds finished and saved", labels=["service"])
    healthy = GaugeMetricFamily("isthmus_healthy", "1: it can serve; 0: it must be started again", labels=["service"])
    state = GaugeMetricFamily("isthmus_state", "1 for what the service does now", labels=["service", "state"])
    missing = GaugeMetricFamily("isthmus_missing", "1 for a party that is waited for", labels=["service", "peer"])
    for name, one in vitals.items():
        service = name.lower()
        completed.add_metric([service], one.completed)
        healthy.add_metric([service], not one.failure)
        state.add_metric([service, one.state], 1)
        for peer in one.missing:
            missing.add_metric([service, peer], 1)
    yield from (completed, healthy, state, missing)
    for one in vitals.values():
        for gauge, value in one.gauges.items():
            yield GaugeMetricFamily(f"isthmus_{gauge}", gauge.replace("_", " "), value=value)


def _of_peers(seen: Iterable[PeerTraffic]) -> Iterator[Metric]:
    labels = ["service", "peer"]
    connected = GaugeMetricFamily("isthmus_connected", "1: the party has an open stream", labels=labels)
    held = GaugeMetricFamily("isthmus_held_bytes", "Requests and answers held for the party", labels=labels)
    received = CounterMetricFamily("isthmus_received_bytes", "Bytes of its requests", labels=labels)
    sent = CounterMetricFamily("isthmus_sent_bytes", "Bytes of answers to it", labels=labels)
    requests = CounterMetricFamily("isthmus_requests", "Its requests, by kind", labels=[*labels, "kind"])
    refusals = CounterMetricFamily("isthmus_refusals", "Answers that are errors, by code", labels=[*labels, "code"])
    for one in seen:
        who = [one.service.lower(), one.peer]
        connected.add_metric(who, one.connected)
        held.add_metric(who, one.held_bytes)
        received.add_metric(who, one.received_bytes)
        sent.add_metric(who, one.sent_bytes)
        for kind, count in sorted(one.requests.items()):
            requests.add_metric([*who, kind], count)
        for code, count in sorted(one.refusals.items()):
            refusals.add_metric([*who, code], count)
    yield from (connected, held, received, sent, requests, refusals)


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, format: str, *args: object) -> None:
        """A probe every few seconds is no news."""


class _HttpServer(WSGIServer):
    """Answers a few requests at a time."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], family: socket.AddressFamily) -> None:
        self.address_family = family
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="monitor")
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # the class between asks the network for this host's name
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._threads.submit(self._respond, request, client_address)

    def _respond(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError:  # the client is gone, or slow
            pass
        finally:
            self.shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _listen(address: str) -> _HttpServer:
    """A server that listens at ``host:port``. Raises as ``Monitor``."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isdecimal() and int(port) < 65536):
        raise RecipeError(f"{address!r} is no address for the metrics", remedy="name one as 127.0.0.1:9464")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, *_, where = found[0]
        return _HttpServer((str(where[0]), int(where[1])), family)
    except OSError as error:
        raise IsthmusError(f"cannot listen at {address}: {error}", remedy="free the port, or name another") from error
