"""A certified peer that asks and does not read, or reads and does not acknowledge: what is held for it is bounded in
bytes and freed; whoever reads is answered, however large the frames and however often the connection breaks."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.errors import ProtocolError
from isthmus.model.checkpoint import Checkpoint
from isthmus.silo.join import greeting
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Service, answered
from isthmus.wire.client import GrpcChannel
from isthmus.wire.inbox import COST, FRAMES, KEPT
from isthmus.wire.server import Server
from tests.conformance.test_channels import HANG, TRUNK, Echo, Late, ask, echoed, joined, number, until
from tests.conftest import make_recipe, save_tiny_model
from tests.hostile.test_many_streams import Raw
from tests.unit.wire.test_identity import Forwarder

LIMIT = 4 * 2**20
BOUND = FRAMES * LIMIT
MOST = BOUND + int(KEPT * BOUND) + LIMIT
"""What one process may hold: requests and unsent answers, answers kept, and a greeting."""
FLOOD = 60
"""Frames of almost ``LIMIT`` bytes in a flood: four times what is allowed."""


def large(value: int = 0) -> pb.Gradient:
    """A body whose frame has almost ``LIMIT`` bytes."""
    return pb.Gradient(gradient=pb.Matrix(rows=value + 1, data=random.Random(value).randbytes(LIMIT - 100)))


def amplified(request: Message) -> Answer:
    """Small requests get large answers."""
    return echoed(request) if isinstance(request, pb.Ping) else answered(large())


@contextmanager
def watched(service: Service, grace: float = HANG) -> Iterator[tuple[Server, list[int]]]:
    """A server, and what it held for ``b`` over the time."""
    peers = {"Trunk": ("a", "b")}
    server = Server({"Trunk": service}, TRUNK, peers, "localhost:0", LIMIT, grace)
    server.start()
    held, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            held.append(server.held("Trunk", "b"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield server, held
    finally:
        over.set()
        thread.join()
        server.stop(0)


def small(port: int, peer: str = "a") -> GrpcChannel:
    return joined(port, peer, limit=LIMIT)


def steady(held: list[int]) -> None:
    """Wait until what is held does not change any more."""
    until(lambda: len(held) > 100 and len(set(held[-100:])) == 1)


@pytest.mark.parametrize("greetings", [True, False])
@pytest.mark.parametrize("acks", [True, False])
def test_answers_that_nobody_reads_are_bounded_and_freed(greetings: bool, acks: bool) -> None:
    service = Echo()
    with watched(service, grace=0.1) as (server, held), closing(small(server.port)) as good:
        with closing(Raw(server.port, limit=LIMIT)) as raw:
            for id in range(1, FLOOD + 1):
                raw.send(large(), id=0 if greetings else id, acked=id - 1 if acks else 0)
                assert ask(good, number(id)) == number(id)
            steady(held)
            assert ask(good, large(1)) == large(1)
        until(lambda: server.held("Trunk", "b") == 0)
        assert LIMIT // 2 < max(held) <= MOST
        with closing(small(server.port, "b")) as honest:
            assert ask(honest, large(2)) == large(2)


def test_answers_read_but_never_acknowledged_are_bounded() -> None:
    with watched(Echo()) as (server, held), closing(Raw(server.port, limit=LIMIT)) as raw:
        for id in range(1, FLOOD + 1):
            raw.send(large(), id=id)
            assert raw.read().id == id
        raw.send(number(1), id=1)  # asks for the first again
        answer = raw.read()
        assert (answer.id, answer.failure.code) == (1, ProtocolError.code)
        assert "not kept any more" in answer.failure.message
        raw.send(number(1), id=FLOOD)
        assert raw.read().gradient == large(), "the last one is kept"
        raw.send(id=FLOOD + 1, acked=FLOOD)
        assert raw.read().HasField("pong")
        assert server.held("Trunk", "b") < 10 * COST
        assert max(held) <= MOST


def test_small_requests_with_large_answers_all_at_once() -> None:
    """Nobody knows how large the answers are until they come: those beyond the bound are refused by name."""
    service = Late()
    with watched(service) as (server, held), closing(small(server.port)) as good:
        with closing(Raw(server.port, limit=LIMIT)) as raw:
            for id in range(1, 41):
                raw.send(number(id), id=id)
            until(lambda: len(service.held) == 40)
            service.held = [(large(), answer) for _, answer in service.held]
            service.answer()
            answers = [raw.read() for _ in range(40)]
            dropped = [one for one in answers if one.failure.code == ProtocolError.code]
            assert 30 < len(dropped) < 40
            assert all("are not read" in one.failure.message for one in dropped)
            raw.send(id=41, acked=40)
            assert raw.read().HasField("pong")
        answer = good.submit(number(1))
        until(lambda: service.held)
        service.answer()
        assert answer.result(HANG) == number(1)
        assert max(held) <= MOST


def test_examples_with_large_answers_wait_for_their_reader() -> None:
    """Their first requests expect the largest answers, so that none has to be refused."""
    service = Echo(amplified)
    with watched(service) as (server, held), closing(Raw(server.port, limit=LIMIT)) as raw:
        for id in range(1, FLOOD + 1):
            raw.send(pb.Forward(step=id, lengths=[1], examples=[id]), id=id)
        steady(held)
        assert len(service.requests) <= FRAMES + 2  # one or two are on their way
        assert [raw.read().gradient == large() for _ in range(FLOOD)] == [True] * FLOOD
        assert max(held) <= MOST


def test_requests_that_are_not_answered_are_bounded() -> None:
    service = Late()
    with watched(service, grace=0.1) as (server, held), closing(small(server.port)) as good:
        for instance in ("i", "j", "k"):  # another process after the other, whose requests are all still there
            with closing(Raw(server.port, instance=instance, limit=LIMIT)) as raw:
                for id in range(1, FLOOD + 1):
                    raw.send(large(), id=id)
                steady(held)
        assert len(service.held) <= FRAMES
        assert max(held) <= MOST
        assert ask(good, pb.Ping()) == pb.Pong()
        service.answer()
        until(lambda: server.held("Trunk", "b") == 0)


def test_another_process_frees_what_its_forerunner_left() -> None:
    with watched(Echo()) as (server, _):
        with closing(Raw(server.port, instance="old", limit=LIMIT)) as raw:
            for id in range(1, FLOOD + 1):
                raw.send(large(), id=id)
            until(lambda: server.held("Trunk", "b") > 2 * LIMIT)
        until(lambda: all(one.name != "requests of b" for one in threading.enumerate()))
        assert server.held("Trunk", "b") > 2 * LIMIT, "it may come again"
        with closing(small(server.port, "b")) as new:
            assert ask(new, number(1)) == number(1)
            assert server.held("Trunk", "b") < 10 * COST


def test_ids_asked_for_again_without_end() -> None:
    service = Echo()
    with watched(service) as (server, held), closing(small(server.port)) as good:
        with closing(Raw(server.port, limit=LIMIT)) as raw:
            raw.send(number(1), id=2**40)
            for id in range(1, 60_000):
                raw.send(number(1), id=id)
            steady(held)
            assert ask(good, number(1)) == number(1)
            stream = next(iter(server._accounts["Trunk", "b"]._inboxes.values())).stream
            assert stream is not None
            assert len(stream.waiting) <= BOUND // COST + 1
        assert max(held) <= MOST


def reconnecting(server: Server, count: int, cuts: tuple[int, ...]) -> list[Any]:
    """Answers to so many large requests sent at once, through a connection that breaks after these bytes each."""
    with closing(Forwarder(server.port)) as forwarder, closing(small(forwarder.port, "b")) as channel:
        if cuts:
            forwarder.cut_after(cuts[0])
        answers = [channel.submit(large(value)) for value in range(count)]
        for cut, answer in zip(cuts[1:], answers, strict=False):
            answer.result(HANG)
            forwarder.cut_after(cut)
        return [answer.result(HANG) for answer in answers]


@pytest.mark.parametrize("cuts", [(), (LIMIT // 2,), (3 * LIMIT, 2 * LIMIT, 5_000_000, 100)])
def test_large_frames_sent_at_once_are_all_answered_over_broken_streams(cuts: tuple[int, ...]) -> None:
    service = Echo()
    with watched(service) as (server, held):
        assert reconnecting(server, 14, cuts) == [large(value) for value in range(14)]
        assert [one for one in service.requests if one != pb.Ping()] == [large(value) for value in range(14)]
        assert max(held) <= MOST


def test_who_waits_for_room_is_told_that_the_server_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.wire.inbox.BEAT_SECONDS", 0.05)
    service = Late()
    with watched(service) as (server, _), closing(joined(server.port, "b", limit=LIMIT, deadline=0.5)) as channel:
        answers = [channel.submit(large(value)) for value in range(6)]
        until(lambda: service.held)
        time.sleep(1.5)  # three deadlines; a ping would have to wait, too
        while not all(answer.done() for answer in answers):
            service.answer()
            time.sleep(0.01)
        assert [answer.result(HANG) for answer in answers] == [large(value) for value in range(6)]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TrunkService, pb.Hello]]:
    recipe = make_recipe(save_tiny_model("llama", tmp_path_factory.mktemp("model"), blocks=3), silos=("a", "b"))
    service = TrunkService(recipe, RunDirectory(tmp_path_factory.mktemp("run")).role("trunk"))
    yield service, greeting(Checkpoint(recipe.model.path), recipe)
    service.stop()


def test_a_trunks_unread_answers_leave_another_silo_its_own(trunk: tuple[TrunkService, pb.Hello]) -> None:
    service, hello = trunk
    lengths = [32] * 128
    wide = pb.Forward(lengths=lengths, hidden=codec.encode(torch.ones(sum(lengths), 32), "fp32"))
    narrow = pb.Forward(lengths=[5], hidden=codec.encode(torch.ones(5, 32), "fp32"))
    with watched(service, grace=0.1) as (server, held), closing(joined(server.port, greeting=hello)) as good:
        alone = good.call(narrow)
        with closing(Raw(server.port, limit=LIMIT)) as raw:
            raw.send(hello)
            assert raw.read().HasField("welcome")
            for step in range(1, 121):
                wide.step = step
                raw.send(wide, id=0 if step % 2 else step)
            for _ in range(10):
                assert good.call(narrow) == alone
            steady(held)
            assert good.call(narrow) == alone
        until(lambda: server.held("Trunk", "b") == 0)
        assert LIMIT // 2 < max(held) <= MOST
