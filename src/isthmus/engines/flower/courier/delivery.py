"""What both processes of the Flower app do, apart from Flower: they hand letters over and bring back the answers."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .letters import Letter, ask

SUPPORTED = ("1.41", "1.42")
"""Versions of flwr with which the app works."""
MARGIN_SECONDS = 120.0
"""Time that a message may take beside that for which the silo holds it; after it, it is taken to be lost."""
NODE_CONFIG = 'silo="NAME" socket="PATH"'


class Delivered(NamedTuple):
    """What became of a message to a node."""

    message: str
    letter: Letter | None
    """The silo's answer; None: there is none, for this reason:"""
    reason: str = ""


class Mail(Protocol):
    """Flower, as a courier needs it."""

    def online(self) -> Mapping[int, str]:
        """The nodes that are there, each with the time since when it is."""
        ...

    def send(self, letters: Collection[tuple[int, Letter]], ttl: float) -> list[str | None]:
        """Send letters to nodes; returns their messages' names, None for those that could not be sent."""
        ...

    def fetch(self, messages: Collection[str]) -> list[Delivered]:
        """What has become of these messages since the last call."""
        ...


class Courier:
    """Carries letters between the root's socket and the nodes, until the federation is over.

    Args:
        root: hands a letter to the root and returns its answer.
        hold: seconds for which a silo that works may hold a letter before it answers that it does.
        extra: what every letter to a node says besides.
    """

    def __init__(
        self, mail: Mail, root: Callable[[Letter], Letter], hold: float, extra: Mapping[str, Any] | None = None
    ) -> None:
        self._mail, self._root, self._hold, self._extra = mail, root, hold, dict(extra or {})
        self._name = secrets.token_hex(8)
        """By which the root knows one courier from the next: what the last one carried is lost."""
        self._sent: dict[str, int] = {}
        """By message under way, its node."""
        self._since: dict[int, str] = {}
        """By node, since when it has been there."""

    def carry(self, wait: float) -> bool:
        """Fetch answers, and send what is due; returns whether there is more to come.

        Args:
            wait: seconds for which to wait for the root, if nothing is due.

        Raises:
            RuntimeError: the federation has failed.
        """
        for one in self._mail.fetch(list(self._sent)) if self._sent else ():
            node = self._sent.pop(one.message)
            if one.letter is None:
                self._fail(node, one.reason)
            else:
                head = {**one.letter.head, "kind": "arrived", "node": node}
                self._root(Letter(head, one.letter.bodies))
        online = self._mail.online()
        self._note_restarts(online)
        asks = {"kind": "collect", "courier": self._name, "online": list(online), "wait": wait}
        due = self._root(Letter(asks))
        self._send(due)
        if due.head["failure"]:
            raise RuntimeError(f"the federation has failed: {due.head['failure']}")
        return not due.head["over"]

    def _note_restarts(self, online: Mapping[int, str]) -> None:
        """A SuperNode that has started again has lost the message that it had."""
        for message, node in list(self._sent.items()):
            if online.get(node, self._since[node]) != self._since[node]:
                del self._sent[message]
                self._fail(node, "its SuperNode has started again")
        self._since |= online

    def _fail(self, node: int, reason: str) -> None:
        self._root(Letter({"kind": "failed", "node": node, "reason": reason}))

    def _send(self, due: Letter) -> None:
        letters = [
            (int(head["node"]), Letter({**head, **self._extra, "hold": self._hold}, (body,)))
            for head, body in zip(due.head["letters"], due.bodies, strict=True)
        ]
        if not letters:
            return
        for (node, _), message in zip(letters, self._mail.send(letters, self._hold + MARGIN_SECONDS), strict=True):
            if message is None:
                self._fail(node, "Flower did not take the message")
            else:
                self._sent[message] = node


def hand_over(letter: Letter, node_config: Mapping[str, Any]) -> Letter:
    """The answer of the silo at this node to a letter of the root.

    Args:
        node_config: what the SuperNode was started with: the silo's name and its socket. A simulated node has its
            number in ``partition-id``, and the letter names the socket.

    Raises:
        RuntimeError: the node names no silo, its silo is not there, or the root refuses the node.
    """
    head = dict(letter.head)
    simulated = "silo" not in node_config and "partition-id" in node_config and "socket" in head
    if not simulated and not {"silo", "socket"} <= node_config.keys():
        raise RuntimeError(f"this node names no silo; start its SuperNode with --node-config '{NODE_CONFIG}'")
    place = head["socket"] if simulated else node_config["socket"]
    who = {"partition": int(node_config["partition-id"])} if simulated else {"silo": str(node_config["silo"])}
    refused = head.pop("refused", "")
    if refused and not letter.bodies[0]:
        raise RuntimeError(f"the root refuses this node: {refused}")
    try:
        answer = ask(str(place), Letter({**head, **who}, letter.bodies), patience=float(head["hold"]))
    except OSError as error:
        raise RuntimeError(
            f"no silo answers at {place} ({error}); start it: isthmus silo RECIPE NAME --flower {place}"
        ) from error
    if refused:
        raise RuntimeError(f"the root refuses this node: {refused}")
    return answer


def check_version(version: str) -> None:
    """Raise ``RuntimeError`` unless the app works with this version of flwr."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise RuntimeError(
            f"flwr {version} is installed in {sys.prefix}; this app works with flwr {' and '.join(SUPPORTED)}: "
            f"pip install 'flwr=={SUPPORTED[-1]}.*'"
        )


def checked_socket(path: str) -> str:
    """The root's socket. Raises ``RuntimeError`` if it is not named."""
    if not path or not Path(path).is_absolute():
        raise RuntimeError(
            f"root = {path!r} is no absolute path: flwr run APP --run-config 'root=\"PATH\"', "
            "where the root was started with --flower PATH"
        )
    return path
