"""``/healthz`` and ``/metrics``: what they say of services and peers, and what they bear."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.error import HTTPError

import pytest
from prometheus_client.parser import text_string_to_metric_families

from isthmus.engines.monitor import Monitor, monitored
from isthmus.errors import IsthmusError, RecipeError
from isthmus.wire.server import Server
from isthmus.wire.traffic import Traffic
from isthmus.wire.vitals import Vitals

HERE = "127.0.0.1:0"


@dataclass
class Told:
    """A service that says this of itself."""

    told: Vitals = field(default_factory=lambda: Vitals("gathering", 3, missing=("south",)))

    def vitals(self) -> Vitals:
        return self.told


class Listening:
    """What a monitor asks of a server."""

    def traffic(self) -> list[Any]:
        north = Traffic("north")
        north.came("update", 100)
        north.came("update", 50)
        north.refuse("update", "round-lost")
        north.sent_bytes = 7
        return [north.seen("Root", connected=True, held_bytes=12)]

    @property
    def expires(self) -> Any:
        import datetime

        return datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    with monitored("root", HERE) as monitor:
        assert monitor is not None
        yield monitor


def served(monitor: Monitor, service: Told) -> None:
    monitor.watch(cast(Server, Listening()), {"Root": service, "Model": object()})


def get(monitor: Monitor, path: str, method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{monitor.port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def value(monitor: Monitor, name: str, **labels: str) -> float:
    """The sample of ``/metrics`` with this name and these labels."""
    code, text = get(monitor, "/metrics")
    assert code == 200
    found = [one for family in text_string_to_metric_families(text) for one in family.samples]
    (sample,) = (one for one in found if (one.name, one.labels) == (name, labels))
    return sample.value


def test_a_role_is_starting_until_it_serves(monitor: Monitor) -> None:
    code, body = get(monitor, "/healthz")
    assert (code, json.loads(body)) == (503, {"status": "starting", "role": "root", "services": {}})
    served(monitor, Told())
    code, body = get(monitor, "/healthz")
    root = {"state": "gathering", "completed": 3, "missing": ["south"]}
    assert (code, json.loads(body)) == (200, {"status": "ok", "role": "root", "services": {"root": root}})


def test_a_service_that_can_serve_nobody_is_failed_and_says_why(monitor: Monitor) -> None:
    served(monitor, Told(Vitals("failed", 3, "the disk is full")))
    code, body = get(monitor, "/healthz")
    told = json.loads(body)
    assert (code, told["status"], told["services"]["root"]["failure"]) == (503, "failed", "the disk is full")
    assert value(monitor, "isthmus_healthy", service="root") == 0


def test_the_metrics_are_the_counts_of_services_and_peers(monitor: Monitor) -> None:
    served(monitor, Told(Vitals("gathering", 3, missing=("south",), gauges={"root_buffered_updates": 2})))
    assert value(monitor, "isthmus_completed_rounds", service="root") == 3
    assert value(monitor, "isthmus_state", service="root", state="gathering") == 1
    assert value(monitor, "isthmus_missing", service="root", peer="south") == 1
    assert value(monitor, "isthmus_root_buffered_updates") == 2
    assert value(monitor, "isthmus_connected", service="root", peer="north") == 1
    assert value(monitor, "isthmus_held_bytes", service="root", peer="north") == 12
    assert value(monitor, "isthmus_received_bytes_total", service="root", peer="north") == 150
    assert value(monitor, "isthmus_sent_bytes_total", service="root", peer="north") == 7
    assert value(monitor, "isthmus_requests_total", service="root", peer="north", kind="update") == 2
    assert value(monitor, "isthmus_refusals_total", service="root", peer="north", code="round-lost") == 1
    assert value(monitor, "isthmus_certificate_expiry_timestamp_seconds") == 1893456000
    assert value(monitor, "process_resident_memory_bytes") > 0


def test_other_paths_and_methods_are_refused(monitor: Monitor) -> None:
    served(monitor, Told())
    assert get(monitor, "/")[0] == 404
    assert get(monitor, "/metrics/../healthz")[0] == 404
    assert get(monitor, "/metrics", "POST")[0] == 405
    assert get(monitor, "/healthz", "HEAD") == (200, "")


@pytest.mark.parametrize("sent", [b"", b"\x00\xff" * 100, b"GET\r\n\r\n", b"GET /metrics HTTP/1.1\r\nx", b"G" * 2**17])
def test_garbage_and_clients_that_leave_do_not_stop_it(monitor: Monitor, sent: bytes) -> None:
    served(monitor, Told())
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", monitor.port)) as client:
            client.sendall(sent)
    assert get(monitor, "/healthz")[0] == 200


def test_clients_that_say_nothing_take_no_thread_for_long(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.engines.monitor._Handler.timeout", 0.2)
    silent = [socket.create_connection(("127.0.0.1", monitor.port)) for _ in range(8)]
    served(monitor, Told())
    assert get(monitor, "/healthz")[0] == 200
    for client in silent:
        client.close()


@pytest.mark.parametrize("address", ["9464", "here:", ":9464", "localhost:x", "localhost:-1", "localhost:99999"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(RecipeError, match="no address for the metrics"):
        Monitor("trunk", address)


@pytest.mark.parametrize("address", ["no-such-host.invalid:1", "192.0.2.1:9464"])
def test_an_address_that_is_not_here_is_refused(address: str) -> None:
    with pytest.raises(IsthmusError, match="cannot listen"):
        Monitor("trunk", address)


def test_a_port_in_use_is_refused(monitor: Monitor) -> None:
    with pytest.raises(IsthmusError, match="cannot listen"):
        Monitor("trunk", f"127.0.0.1:{monitor.port}")


def test_no_address_no_monitor() -> None:
    with monitored("trunk", None) as monitor:
        assert monitor is None
