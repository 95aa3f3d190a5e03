"""Network namespaces: one for who leads, one for each silo, and cables between them that can be pulled.

Needs root, ``ip`` and ``iptables``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Self

LEADER = "leader"
PORT = 50051


class Network:
    """A namespace for each party; each silo's has a cable to the leader's, over which one TCP port answers.

    Args:
        silos: their names.
        name: begins the names of the namespaces; networks of other names are apart.
    """

    address = f"10.77.0.1:{PORT}"
    """The leader's, as every silo reaches it."""

    def __init__(self, silos: Sequence[str], name: str = "isthmus") -> None:
        self._silos, self._name = tuple(silos), name

    def namespace(self, party: str) -> str:
        return f"{self._name}-{party}"

    def inside(self, party: str, *command: str) -> list[str]:
        """The command, to be run in a party's namespace."""
        return ["ip", "netns", "exec", self.namespace(party), *command]

    def pull(self, silo: str) -> None:
        """Let no packet through a silo's cable any more, in either direction; nobody hears of it."""
        self._cable("-I", silo)

    def plug(self, silo: str) -> None:
        """Undo ``pull``."""
        self._cable("-D", silo)

    def __enter__(self) -> Self:
        try:
            for party in (LEADER, *self._silos):
                _run("ip", "netns", "add", self.namespace(party))
                self._run(party, "ip", "link", "set", "lo", "up")
            self._run(LEADER, "ip", "addr", "add", "10.77.0.1/32", "dev", "lo")
            for number, silo in enumerate(self._silos, 1):
                self._lay_cable(silo, f"10.77.{number}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for party in (LEADER, *self._silos):
            subprocess.run(["ip", "netns", "del", self.namespace(party)], capture_output=True)

    def _lay_cable(self, silo: str, subnet: str) -> None:
        near = ["ip", "link", "add", f"to-{silo}", "netns", self.namespace(LEADER)]
        _run(*near, "type", "veth", "peer", "up0", "netns", self.namespace(silo))
        for party, link, last in ((LEADER, f"to-{silo}", 1), (silo, "up0", 2)):
            self._run(party, "ip", "addr", "add", f"{subnet}.{last}/24", "dev", link)
            self._run(party, "ip", "link", "set", link, "up")
        self._run(silo, "ip", "route", "add", "default", "via", f"{subnet}.1")
        out = ["iptables", "-A", "OUTPUT", "-o", "up0"]
        self._run(silo, *out, "-p", "tcp", "--dport", str(PORT), "-j", "ACCEPT")
        self._run(silo, *out, "-j", "DROP")
        self._run(silo, "iptables", "-A", "INPUT", "-i", "up0", "-p", "tcp", "--syn", "-j", "DROP")

    def _cable(self, action: str, silo: str) -> None:
        for chain, way in (("INPUT", "-i"), ("OUTPUT", "-o")):
            self._run(LEADER, "iptables", action, chain, way, f"to-{silo}", "-j", "DROP")

    def _run(self, party: str, *command: str) -> None:
        _run(*self.inside(party, *command))


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
