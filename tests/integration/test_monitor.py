"""Server roles as real processes, watched over HTTP while a federation trains."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.processes import Command, Commands, free_port, until, write_federation

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]


def watched(command: Command) -> str:
    """Where the role answers, as its log says."""
    until(lambda: "/metrics" in command.stderr, "the metrics' address", command=command)
    found = re.search(r"http://127\.0\.0\.1:\d+", command.stderr)
    assert found is not None
    return found.group()


def health(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=30) as answer:
            return dict(json.load(answer))
    except HTTPError as error:
        return dict(json.load(error))


def counts(url: str, name: str) -> dict[tuple[str, str], float]:
    """A metric's samples, by service and peer, summed over other labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name == name:
                key = one.labels["service"], one.labels.get("peer", "")
                found[key] = found.get(key, 0.0) + one.value
    return found


def test_a_federation_is_watched_from_before_it_begins_until_it_is_over(commands: Commands, tmp_path: Path) -> None:
    address = {"address": f"localhost:{free_port()}"}
    train = {"rounds": 2, "steps": 3, "evaluate": False}
    recipe = write_federation(tmp_path / "made", train=train, trunk=address, root=address)
    commands.run("certificates", recipe).succeeded()
    metrics = "--metrics", "127.0.0.1:0"
    server = commands.start("trunk", recipe, "--with-root", "--run-dir", tmp_path / "run", *metrics)
    url = watched(server)
    assert health(url)["status"] in ("starting", "ok")
    until(lambda: health(url)["status"] == "ok", "the role to serve", command=server)
    assert health(url)["services"]["root"] == {"state": "gathering", "completed": 0, "missing": ["north", "south"]}

    north = commands.start("silo", recipe, "north", "--run-dir", tmp_path / "run-north")
    until(lambda: health(url)["services"]["root"]["missing"] == ["south"], "north to be there", command=server)
    assert counts(url, "isthmus_missing") == {("root", "south"): 1}
    south = commands.start("silo", recipe, "south", "--run-dir", tmp_path / "run-south")
    north.wait().succeeded()
    south.wait().succeeded()

    until(lambda: not any(counts(url, "isthmus_connected").values()), "the silos to leave", command=server)
    told = health(url)
    assert told["status"] == "ok"
    assert told["services"]["root"] == {"state": "finished", "completed": 2, "missing": []}
    assert told["services"]["trunk"]["completed"] == 2
    assert counts(url, "isthmus_completed_rounds") == {("root", ""): 2, ("trunk", ""): 2}
    requests, received = counts(url, "isthmus_requests_total"), counts(url, "isthmus_received_bytes_total")
    for silo in ("north", "south"):
        assert requests["trunk", silo] >= 12  # a forward and a backward pass a step
        assert received["trunk", silo] > received["root", silo] > 0
    server.process.terminate()
    server.wait().succeeded()


def test_a_port_in_use_is_named_before_the_role_starts(commands: Commands, tmp_path: Path) -> None:
    recipe = write_federation(tmp_path / "made")
    commands.run("certificates", recipe).succeeded()
    first = commands.start("root", recipe, "--address", "localhost:0", "--metrics", "127.0.0.1:0")
    port = watched(first).rpartition(":")[2]
    second = commands.run("root", recipe, "--address", "localhost:0", "--metrics", f"127.0.0.1:{port}")
    second.failed(f"cannot listen at 127.0.0.1:{port}", "free the port")
    commands.run("root", recipe, "--metrics", "9464").failed("'9464' is no address", "127.0.0.1:9464")
