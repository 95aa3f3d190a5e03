"""What a gateway does, in numbers, as Prometheus reads them: no text, and nobody's name."""

from __future__ import annotations

from prometheus_client import PROCESS_COLLECTOR, CollectorRegistry, Counter, Gauge, Histogram, exposition

from isthmus.gateway.batcher import Batcher
from isthmus.gateway.responses import Usage

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Seconds of requests: answers of many tokens take long."""
CONTENT_TYPE = exposition.CONTENT_TYPE_PLAIN_0_0_4


class GatewayMetrics:
    """Counts requests and tokens since the gateway started."""

    def __init__(self, batcher: Batcher) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(PROCESS_COLLECTOR)
        prefix = "isthmus_gateway"
        self._requests = Counter(f"{prefix}_requests", "Requests answered", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            f"{prefix}_request_seconds", "Seconds to the end of an answer", ["path"], registry=registry, buckets=BUCKETS
        )
        self._tokens = Counter(f"{prefix}_tokens", "Tokens of prompts and answers", ["kind"], registry=registry)
        self._releases = Counter(f"{prefix}_releases", "Releases of hidden states to the trunk", registry=registry)
        running = Gauge(f"{prefix}_running", "Requests that are being answered", registry=registry)
        waiting = Gauge(f"{prefix}_waiting", "Requests that wait for room", registry=registry)
        connected = Gauge(f"{prefix}_connected", "1: the trunk is there", registry=registry)
        running.set_function(lambda: batcher.load[0])
        waiting.set_function(lambda: batcher.load[1])
        connected.set_function(lambda: batcher.open)

    def note_request(self, path: str, status: int, seconds: float) -> None:
        """A request is over.

        Args:
            path: one of those that are known.
            status: 0: the client had gone.
        """
        self._requests.labels(path, str(status or "gone")).inc()
        self._seconds.labels(path).observe(seconds)

    def note_answers(self, usage: Usage, releases: int) -> None:
        """The answers to a request are over.

        Args:
            releases: of hidden states, for them.
        """
        for kind, tokens in (("prompt", usage.prompt), ("reused", usage.reused), ("written", usage.written)):
            self._tokens.labels(kind).inc(tokens)
        self._releases.inc(releases)

    def page(self) -> bytes:
        """All of it now, in Prometheus' text format."""
        return exposition.generate_latest(self._registry)
