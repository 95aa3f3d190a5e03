"""A gateway runs for months: it renews its certificate by itself, and goes on when the one it began with ends."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import pytest

from tests.integration.gateways import Gateway
from tests.integration.processes import Commands, until
from tests.integration.test_joining import Led

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
LEFT = datetime.timedelta(seconds=60)
"""Of the certificate's life, when the gateway is started."""


def test_a_running_gateway_renews_its_certificate(commands: Commands, tmp_path: Path) -> None:
    train = {"rounds": 1, "steps": 1, "evaluate": False}
    led = Led(commands, tmp_path, ("north",), train=train, root={"minimum": 1}, federation={})
    led.join("north")
    led.silo("north").wait().succeeded()

    first, ends = led.age("north", LEFT), time.monotonic() + LEFT.total_seconds()
    gateway = Gateway(commands, tmp_path / "north" / "run")
    client = gateway.client()

    def answer() -> str:
        return client.completions.create(model="run", prompt="w4 w5", max_tokens=4, temperature=0).choices[0].text

    said = answer()
    until(lambda: led.serial("north") != first, "the first renewal", command=gateway.command)
    assert "the certificate of north was renewed" in gateway.log

    second = led.age("north")
    until(lambda: led.serial("north") not in (first, second), "the second renewal", command=gateway.command)

    while time.monotonic() < ends + 5:  # the stream of the first certificate ends with it
        assert answer() == said
        time.sleep(1)
    assert answer() == said
    assert gateway.command.process.is_running()
    assert "the trunk is gone" not in gateway.log
