"""The doctor of a silo whose network lets one TCP port out, in a namespace of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from isthmus.joining.join import join_federation
from tests.integration.processes import free_port
from tests.unit.joining.test_join import Coordinator, rows

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]
HERE, THERE = "10.213.77.1", "10.213.77.2"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def namespace(port: int) -> Iterator[str]:
    """A network from which one TCP port of this machine alone is reached; skips where none can be made."""
    if os.getuid() or not shutil.which("ip") or not shutil.which("iptables"):
        pytest.skip("namespaces take root, ip and iptables")
    name, cable = f"isthmus-{os.getpid()}", f"is{os.getpid() % 100000}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    if made.returncode:
        pytest.skip("this machine makes no namespaces")
    inside = "netns", "exec", name
    try:
        ip("link", "add", f"{cable}a", "type", "veth", "peer", "name", f"{cable}b", "netns", name)
        ip("addr", "add", f"{HERE}/30", "dev", f"{cable}a")
        ip("link", "set", f"{cable}a", "up")
        ip("-n", name, "addr", "add", f"{THERE}/30", "dev", f"{cable}b")
        ip("-n", name, "link", "set", f"{cable}b", "up")
        ip("-n", name, "link", "set", "lo", "up")
        for rule in (
            ("OUTPUT", "-o", "lo", "-j", "ACCEPT"),
            ("OUTPUT", "-p", "tcp", "-d", HERE, "--dport", str(port), "-j", "ACCEPT"),
            ("OUTPUT", "-j", "DROP"),
        ):
            ip(*inside, "iptables", "-A", *rule)
        yield name
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no such network: {error.stderr.decode()[:200]}")
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{cable}a"], capture_output=True)


def examined(name: str, recipe: Path, *flags: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code and findings of the doctor in a namespace."""
    words = ["ip", "netns", "exec", name, sys.executable, "-m", "isthmus", "doctor", str(recipe), "--json", *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.stdout, done.stderr
    return done.returncode, {one["check"]: one for one in json.loads(done.stdout)["findings"]}


def test_one_port_out_is_enough_and_another_is_named(tmp_path: Path) -> None:
    port = free_port()
    with namespace(port) as name:
        address = {"address": f"{HERE}:{port}"}
        leader = Coordinator(tmp_path / "leader", trunk=address, root=address)
        with leader.serving():
            joined = join_federation(leader.authority.invite("north"), tmp_path / "north", rows(tmp_path / "data"))
            code, found = examined(name, joined.recipe)
            assert code == 0, found
            assert {one["state"] for one in found.values()} == {"ok"}, found
            assert found["dry run"]["words"].startswith("10 steps")
            closed = joined.recipe.read_text().replace(f":{port}", f":{free_port()}", 1)
            joined.recipe.write_text(closed)
            code, found = examined(name, joined.recipe, "--no-dry-run")
            assert code == 1
            assert "does not answer within" in found["trunk"]["words"]
            assert "firewall" in found["trunk"]["remedy"]
            assert found["root"]["state"] == found["authority"]["state"] == "ok"
