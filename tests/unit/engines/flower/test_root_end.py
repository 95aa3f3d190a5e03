"""The root's end, letter by letter. Whole rounds: ``tests/features/engines``; as a channel: ``tests/conformance``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from isthmus.engines.flower import root_end
from isthmus.engines.flower.courier.letters import Letter
from isthmus.engines.flower.root_end import RootEnd
from isthmus.engines.flower.silo_end import FlowerChannel
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.vitals import Vitals
from tests.conformance.test_channels import AUTHORITY, SILOS, TRUNK, Echo

NODE = 5


class Root(Echo):
    """An echo that says how it is."""

    state, failure = "training", ""

    def vitals(self) -> Vitals:
        return Vitals(self.state, 1, self.failure)


def end_of(service: Root, **options: Any) -> RootEnd:
    return RootEnd(service, TRUNK, SILOS, 2**20, **options)


def collect(end: RootEnd, *online: int, wait: float = 0.0) -> Letter:
    return end.exchange(Letter({"kind": "collect", "online": online or (NODE,), "wait": wait}))


def arrive(end: RootEnd, reply: Letter, node: int = NODE) -> None:
    end.exchange(Letter({**reply.head, "kind": "arrived", "node": node}, reply.bodies))


def deliver(end: RootEnd, channel: FlowerChannel, due: Letter, hold: float = 0.05) -> Letter:
    """Carry the one letter that is due there, and the answer back."""
    (head,), (body,) = due.head["letters"], due.bodies
    reply = channel.exchange(Letter({**head, "hold": hold}, (body,)))
    arrive(end, reply, head["node"])
    return reply


@pytest.fixture
def channel() -> FlowerChannel:
    return FlowerChannel(AUTHORITY.issue("a"), pb.Ping())


def connected(end: RootEnd, channel: FlowerChannel) -> None:
    for _ in range(2):
        deliver(end, channel, collect(end))


def test_a_node_is_asked_once_until_it_has_answered(channel: FlowerChannel) -> None:
    end = end_of(Root())
    due = collect(end)
    assert due.head["letters"] == [{"node": NODE}]
    assert collect(end).head["letters"] == []
    deliver(end, channel, due)
    assert [head["number"] for head in collect(end).head["letters"]] == [1]


def test_a_silo_that_works_is_asked_again_and_one_that_waits_is_not(channel: FlowerChannel) -> None:
    heard = True
    end = end_of(service := Root(), speaks=lambda silo: heard)
    connected(end, channel)  # no thread of the silo waits for an answer: it works
    assert [head["number"] for head in collect(end).head["letters"]] == [2]
    end.exchange(Letter({"kind": "failed", "node": NODE, "reason": "lost"}))
    heard = False
    assert service.peers[0] == "a"


def test_a_lost_letter_is_sent_again_as_it_was_after_a_pause(
    channel: FlowerChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(root_end, "AGAIN_SECONDS", 0.2)
    end = end_of(Root())
    connected(end, channel)
    first = collect(end)
    end.exchange(Letter({"kind": "failed", "node": NODE, "reason": "lost"}))
    assert collect(end).head["letters"] == []
    again = _soon(lambda: collect(end), lambda letter: letter.head["letters"])
    assert again == first


def test_what_a_courier_had_under_way_is_sent_again_by_the_next(channel: FlowerChannel) -> None:
    end = end_of(Root())
    deliver(end, channel, collect(end))
    asks = {"kind": "collect", "online": [NODE], "wait": 0.0}
    first = end.exchange(Letter({**asks, "courier": "one"}))
    assert [head["number"] for head in first.head["letters"]] == [1]
    assert end.exchange(Letter({**asks, "courier": "one"})).head["letters"] == []
    second = end.exchange(Letter({**asks, "courier": "other"}))
    assert (second.head["letters"], second.bodies) == (first.head["letters"], first.bodies)
    deliver(end, channel, second)
    assert [head["number"] for head in end.exchange(Letter({**asks, "courier": "other"})).head["letters"]] == [2]


def test_what_arrives_after_the_end_is_not_handled(channel: FlowerChannel) -> None:
    """Another end may have these silos by then."""
    end = end_of(service := Root())
    connected(end, channel)
    channel.submit(pb.Ready())
    (head,), (body,) = (due := collect(end)).head["letters"], due.bodies
    reply = channel.exchange(Letter({**head, "hold": 0.05}, (body,)))
    end.close()
    before = len(service.requests)
    arrive(end, reply)
    assert len(service.requests) == before


def test_an_answer_to_a_letter_that_was_given_up_is_passed_over(channel: FlowerChannel) -> None:
    end = end_of(Root())
    connected(end, channel)
    due = collect(end)
    arrive(end, Letter({"silo": "a", "session": "another", "number": 9}, (b"noise",)))
    deliver(end, channel, due)
    assert [head["number"] for head in collect(end).head["letters"]] == [3]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"silo": "stranger"}, "names the silo 'stranger', which is not in the recipe; remedy: name one of these"),
        ({"silo": "b"}, "says that it is b, and shows the certificate of a"),
    ],
)
def test_a_node_that_is_not_what_it_says_is_refused(
    said: dict[str, str], told: str, channel: FlowerChannel, caplog: pytest.LogCaptureFixture
) -> None:
    end = end_of(Root())
    for _ in range(2):
        due = collect(end)
        if due.head["letters"] and "refused" in due.head["letters"][0]:
            break
        (head,), (body,) = due.head["letters"], due.bodies
        reply = channel.exchange(Letter({**head, "hold": 0.05}, (body,)))
        arrive(end, Letter({**reply.head, **said}, reply.bodies))
    else:
        due = collect(end)
    assert told in due.head["letters"][0]["refused"]
    assert any("a node is refused" in one for one in caplog.messages)


def test_a_second_node_of_a_silo_is_refused_while_the_first_is_online(channel: FlowerChannel) -> None:
    end = end_of(Root())
    connected(end, channel)
    both = collect(end, NODE, 6)
    other = FlowerChannel(AUTHORITY.issue("a"), pb.Ping())
    head = next(one for one in both.head["letters"] if one["node"] == 6)
    arrive(end, other.exchange(Letter({**head, "hold": 0.0}, (b"",))), 6)
    refused = next(one for one in collect(end, NODE, 6).head["letters"] if one["node"] == 6)
    assert f"names the silo a, which node {NODE} has shown that it is" in refused["refused"]


def test_the_other_node_may_take_over_once_the_first_is_gone(channel: FlowerChannel) -> None:
    end = end_of(Root())
    connected(end, channel)
    other = FlowerChannel(AUTHORITY.issue("a"), pb.Ping())
    for _ in range(2):
        reply = deliver(end, other, collect(end, 6))
    assert reply.head["number"] == 1
    assert other.greeted.done() or collect(end, 6).head["letters"]


def test_it_is_over_once_every_node_has_heard_so(channel: FlowerChannel) -> None:
    end = end_of(service := Root())
    connected(end, channel)
    service.state = "finished"
    assert not collect(end).head["over"]
    arrive(end, Letter({"silo": "a", "session": "s", "number": 2, "over": True, "failure": ""}, (b"",)))
    assert collect(end).head["over"]
    assert end.over.is_set()


def test_a_failure_is_told_once_all_have_heard_it(channel: FlowerChannel) -> None:
    end = end_of(service := Root())
    service.failure = "the disk is full"
    assert collect(end).head["failure"] == ""
    end.exchange(Letter({"kind": "failed", "node": NODE, "reason": "gone"}))
    found = collect(end)
    assert (found.head["over"], found.head["failure"]) == (True, "the disk is full")


def _soon(found: Callable[[], Letter], good: Callable[[Letter], object]) -> Letter:
    end = time.monotonic() + 10
    while not good(letter := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return letter
