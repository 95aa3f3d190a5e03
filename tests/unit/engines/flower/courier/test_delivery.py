"""The courier, apart from Flower."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from isthmus.engines.flower.courier.delivery import (
    SUPPORTED,
    Courier,
    Delivered,
    check_version,
    checked_socket,
    hand_over,
)
from isthmus.engines.flower.courier.letters import Letter, Postbox


class Mail:
    """Flower as a list of what was sent."""

    def __init__(self) -> None:
        self.nodes = {1: "noon"}
        self.sent: list[tuple[int, Letter]] = []
        self.delivered: list[Delivered] = []
        self.taken = True

    def online(self) -> dict[int, str]:
        return dict(self.nodes)

    def send(self, letters: Collection[tuple[int, Letter]], ttl: float) -> list[str | None]:
        self.sent += letters
        return [f"m{len(self.sent)}" if self.taken else None for _ in letters]

    def fetch(self, messages: Collection[str]) -> list[Delivered]:
        found, self.delivered = self.delivered, []
        return found


class Root:
    """Notes what it is told; ``due`` goes to nodes once."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.due: list[int] = [1]
        self.over, self.failure = False, ""

    def __call__(self, letter: Letter) -> Letter:
        self.told.append(dict(letter.head))
        if letter.head["kind"] != "collect":
            return Letter({})
        due, self.due = self.due, []
        heads = [{"node": node} for node in due]
        return Letter({"letters": heads, "over": self.over, "failure": self.failure}, (b"x",) * len(due))

    def failed(self) -> list[str]:
        return [one["reason"] for one in self.told if one["kind"] == "failed"]


def test_it_carries_there_and_back_until_all_is_over() -> None:
    mail, root = Mail(), Root()
    courier = Courier(mail, root, hold=3.0, extra={"socket": "/s"})
    assert courier.carry(0)
    assert mail.sent == [(1, Letter({"node": 1, "socket": "/s", "hold": 3.0}, (b"x",)))]
    mail.delivered = [Delivered("m1", Letter({"silo": "a"}, (b"y",)))]
    root.over = True
    assert not courier.carry(0)
    assert {"kind": "arrived", "silo": "a", "node": 1} in root.told


def test_what_is_lost_is_told_to_the_root() -> None:
    mail, root = Mail(), Root()
    courier = Courier(mail, root, hold=3.0)
    courier.carry(0)
    mail.delivered = [Delivered("m1", None, "expired")]
    root.due = [1]
    courier.carry(0)
    assert root.failed() == ["expired"]
    mail.nodes, root.due = {1: "one o'clock"}, [1]
    mail.taken = False
    courier.carry(0)
    assert root.failed() == ["expired", "its SuperNode has started again", "Flower did not take the message"]


def test_a_federation_that_fails_fails_the_app() -> None:
    root = Root()
    root.failure = "no silo is left"
    with pytest.raises(RuntimeError, match="the federation has failed: no silo is left"):
        Courier(Mail(), root, hold=1.0).carry(0)


def test_a_letter_goes_to_the_silo_that_the_node_names(tmp_path: Path) -> None:
    with Postbox(tmp_path / "box", lambda letter: Letter({"heard": letter.head}, letter.bodies)):
        node = {"silo": "north", "socket": str(tmp_path / "box")}
        answer = hand_over(Letter({"hold": 1.0, "socket": "/elsewhere"}, (b"x",)), node)
        assert answer.head["heard"]["silo"] == "north"
        simulated = {"partition-id": 3, "num-partitions": 4}
        answer = hand_over(Letter({"hold": 1.0, "socket": str(tmp_path / "box")}, (b"x",)), simulated)
        assert answer.head["heard"]["partition"] == 3


@pytest.mark.parametrize("node", [{}, {"silo": "north"}, {"socket": "/s"}, {"partition-id": 1}])
def test_a_node_that_names_no_silo_is_told_how(node: dict[str, object]) -> None:
    with pytest.raises(RuntimeError, match="--node-config 'silo="):
        hand_over(Letter({"hold": 0.0}, (b"",)), node)


def test_a_silo_that_is_not_there_is_named_with_the_command_that_starts_it(tmp_path: Path) -> None:
    node = {"silo": "north", "socket": str(tmp_path / "box")}
    with pytest.raises(RuntimeError, match=f"isthmus silo RECIPE NAME --flower {tmp_path}/box"):
        hand_over(Letter({"hold": 0.0}, (b"",)), node)


def test_a_refused_node_says_so_and_the_silo_hears_what_tls_says(tmp_path: Path) -> None:
    heard: list[Letter] = []
    with Postbox(tmp_path / "box", lambda letter: heard.append(letter) or letter):
        node = {"silo": "north", "socket": str(tmp_path / "box")}
        for body in (b"", b"alert"):
            with pytest.raises(RuntimeError, match="the root refuses this node: who are you"):
                hand_over(Letter({"hold": 0.0, "refused": "who are you"}, (body,)), node)
    assert [one.bodies for one in heard] == [(b"alert",)]


@pytest.mark.parametrize("version", ["1.40.2", "1.43.0", "2.0.0", "0.9"])
def test_another_flwr_is_refused_by_name(version: str) -> None:
    with pytest.raises(RuntimeError, match=f"flwr {version} is installed .* works with flwr 1.41 and 1.42"):
        check_version(version)


def test_the_supported_ones_are_not() -> None:
    for version in SUPPORTED:
        check_version(f"{version}.3")


@pytest.mark.parametrize("path", ["", "root.sock"])
def test_a_root_without_an_absolute_socket_is_refused(path: str) -> None:
    with pytest.raises(RuntimeError, match="--run-config"):
        checked_socket(path)
    assert checked_socket("/root.sock") == "/root.sock"
