"""What every channel promises: on loopback, on gRPC with real certificates, and in letters as Flower carries them."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest
from google.protobuf.message import Message

from isthmus import errors
from isthmus.engines.flower.courier.letters import Letter
from isthmus.engines.flower.root_end import RootEnd
from isthmus.engines.flower.silo_end import FlowerChannel
from isthmus.errors import FrameError, FrameSizeError, IsthmusError, MismatchError, PeerGoneError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.channel import Answer, Channel, LoopbackChannel, Service, answered
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity
from isthmus.wire.server import Server
from isthmus.wire.vitals import Vitals

HANG = 30.0
"""Seconds after which something is taken to hang."""
LIMIT = 64 * 2**20
SILOS = ("a", "b")
AUTHORITY = Authority()
TRUNK = AUTHORITY.issue("trunk", also=("root",))
KINDS = errors._tree(IsthmusError)


class Echo:
    """Notes each request, then answers ``Ping`` with ``Pong``, ``Hello`` with ``Welcome`` and all else with
    itself, or as ``how`` does."""

    def __init__(self, how: Callable[[Message], Answer] | None = None) -> None:
        self.peers: list[str] = []
        self.requests: list[Message] = []
        self._how = how or echoed

    def handle(self, peer: str, request: Message) -> Answer:
        self.peers.append(peer)
        self.requests.append(request)
        return self._how(request)


class Late(Echo):
    """Answers only when it is told to; ``held`` has the requests still to answer."""

    def __init__(self) -> None:
        super().__init__(self._hold)
        self.held: list[tuple[Message, Answer]] = []

    def answer(self, order: Callable[[list[Any]], Any] = list) -> None:
        held, self.held = self.held, []
        for request, answer in order(held):
            answer.set_result(request)

    def _hold(self, request: Message) -> Answer:
        if isinstance(request, pb.Ping):
            return echoed(request)
        answer = Answer()
        self.held.append((request, answer))
        return answer


def echoed(request: Message) -> Answer:
    answer: Answer = Answer()
    known = {pb.Ping: pb.Pong(), pb.Hello: pb.Welcome()}
    answer.set_result(known.get(type(request), request))
    return answer


def failing(error: Exception, *, late: bool) -> Callable[[Message], Answer]:
    """Answers with this error, raised or set on the future; pings stay pongs."""

    def how(request: Message) -> Answer:
        if isinstance(request, pb.Ping):
            return echoed(request)
        if not late:
            raise error
        answer: Answer = Answer()
        threading.Timer(0.01, answer.set_exception, (error,)).start()
        return answer

    return how


@contextmanager
def serving(
    services: Mapping[str, Service], *, address: str = "localhost:0", limit: int = LIMIT, identity: Identity = TRUNK
) -> Iterator[Server]:
    server = Server(services, identity, dict.fromkeys(services, SILOS), address, limit)
    server.start()
    try:
        yield server
    finally:
        server.stop(0)


def joined(port: int, peer: str = "a", *, service: str = "Trunk", **options: Any) -> GrpcChannel:
    return GrpcChannel(f"localhost:{port}", service, AUTHORITY.issue(peer), **{"deadline": HANG, **options})


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def number(value: int) -> pb.Adapters:
    """A body that is told from others, and so is its echo. It is no request, so that any answer to it is allowed."""
    return pb.Adapters(completed=value)


def of_size(size: int, *, id: int = 1) -> pb.Gradient:
    """A body whose frame with this id has this many bytes."""
    body = pb.Gradient(gradient=pb.Matrix(data=bytes(size)))
    for _ in range(3):
        body.gradient.data = bytes(len(body.gradient.data) + size - frames.wrap(body, id=id).ByteSize())
    assert frames.wrap(body, id=id).ByteSize() == size
    return body


def ask(channel: Channel, request: Message) -> Any:
    return channel.submit(request).result(HANG)


Connect = Callable[..., Channel]


@contextmanager
def carried(service: Service, peer: str, *, limit: int = LIMIT, **options: Any) -> Iterator[FlowerChannel]:
    """A channel to the root through letters that a thread carries, as Flower would; every third is lost or comes
    twice."""
    end = RootEnd(Watched(service), TRUNK, SILOS, limit)
    channel = FlowerChannel(AUTHORITY.issue(peer), options.get("greeting", pb.Ping()), limit=limit)
    over, carried = threading.Event(), itertools.count(1)

    def carry() -> None:
        while not over.is_set():
            due = end.exchange(Letter({"kind": "collect", "online": [1], "wait": 0.01}))
            for head, body in zip(due.head["letters"], due.bodies, strict=True):
                for _ in range(1 + (next(carried) % 3 == 0)):
                    reply = channel.exchange(Letter({**head, "hold": 0.05}, (body,)))
                end.exchange(Letter({**reply.head, "kind": "arrived", "node": 1}, reply.bodies))

    thread = threading.Thread(target=carry, daemon=True)
    thread.start()
    try:
        channel.greeted.result(HANG)
        yield channel
    finally:
        channel.part()  # else the courier waits for the silo's last word
        over.set()
        thread.join(HANG)
        end.close()


class Watched:
    """A service that says how it is."""

    def __init__(self, service: Service) -> None:
        self.handle = service.handle

    def vitals(self) -> Vitals:
        return Vitals("training", 0)


@pytest.fixture(params=["loopback", "grpc", "flower"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Connects a service: ``connect(service, peer="a", greeting=..., limit=...)``."""
    with ExitStack() as opened:

        def build(service: Service, peer: str = "a", **options: Any) -> Channel:
            if request.param == "loopback":
                return opened.enter_context(closing(LoopbackChannel(service, peer, **options)))
            if request.param == "flower":
                return opened.enter_context(carried(service, peer, **options))
            server = opened.enter_context(serving({"Trunk": service}, limit=options.get("limit", LIMIT)))
            return opened.enter_context(closing(joined(server.port, peer, **options)))

        yield build


def test_requests_arrive_in_order(connect: Connect) -> None:
    service = Echo()
    channel = connect(service, greeting=pb.Ping())
    answers = [channel.submit(number(value)) for value in range(300)]
    assert [answer.result(HANG).completed for answer in answers] == list(range(300))
    assert service.requests == [pb.Ping(), *map(number, range(300))]


@pytest.mark.parametrize("order", [list, reversed, lambda held: random.Random(0).sample(held, len(held))])
def test_answers_may_come_in_any_order(connect: Connect, order: Callable[[list[Any]], Any]) -> None:
    service = Late()
    channel = connect(service)
    answers = [channel.submit(number(value)) for value in range(20)]
    until(lambda: len(service.held) == 20)
    assert not any(answer.done() for answer in answers)
    service.answer(order)
    assert [answer.result(HANG).completed for answer in answers] == list(range(20))


def test_a_late_answer_holds_no_other_up(connect: Connect) -> None:
    service = Late()
    channel = connect(service)
    late = channel.submit(number(1))
    assert ask(channel, pb.Ping()) == pb.Pong()
    assert not late.done()
    service.answer()
    assert late.result(HANG) == number(1)


@pytest.mark.parametrize("late", [False, True], ids=["raised", "set"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_arrives_as_it_was(connect: Connect, kind: type[IsthmusError], late: bool) -> None:
    channel = connect(Echo(failing(kind("what happened – é\nthere", remedy="do this"), late=late)))
    with pytest.raises(IsthmusError) as arrived:
        ask(channel, number(1))
    assert type(arrived.value) is kind
    assert (arrived.value.message, arrived.value.remedy) == ("what happened – é\nthere", "do this")
    assert ask(channel, pb.Ping()) == pb.Pong()


@pytest.mark.parametrize("late", [False, True], ids=["raised", "set"])
@pytest.mark.parametrize("error", [ValueError("patient Smith"), KeyError("patient Smith"), MemoryError()])
def test_an_unexpected_error_arrives_without_its_text(connect: Connect, error: Exception, late: bool) -> None:
    channel = connect(Echo(failing(error, late=late)))
    with pytest.raises(IsthmusError) as arrived:
        ask(channel, number(1))
    assert type(arrived.value) is IsthmusError
    assert arrived.value.remedy
    assert "Smith" not in str(arrived.value)
    assert ask(channel, pb.Ping()) == pb.Pong()


@pytest.mark.parametrize("malformed", [pb.Commit(step=1, weight=1), pb.Hello(version=99), pb.Forward(step=1)])
def test_a_malformed_request_never_reaches_the_service(connect: Connect, malformed: Message) -> None:
    service = Echo()
    channel = connect(service, greeting=pb.Ping())
    with pytest.raises(FrameError) as refused:
        ask(channel, malformed)
    assert refused.value.remedy
    assert ask(channel, number(1)) == number(1)
    assert service.requests == [pb.Ping(), number(1)]


def test_a_malformed_answer_is_an_error(connect: Connect) -> None:
    def how(request: Message) -> Answer:
        return answered(pb.Hello(version=99)) if request == number(1) else echoed(request)

    with pytest.raises(FrameError):
        ask(connect(Echo(how)), number(1))


def test_a_frame_over_the_limit_is_refused_on_submit(connect: Connect) -> None:
    service = Echo()
    channel = connect(service, limit=10_000)
    assert ask(channel, of_size(10_000)) == of_size(10_000), "just within"
    sent, seen = channel.sent_bytes, len(service.requests)
    with pytest.raises(FrameSizeError) as refused:
        channel.submit(of_size(10_001))
    assert refused.value.remedy
    assert channel.sent_bytes == sent
    assert ask(channel, number(1)) == number(1)
    assert service.requests[seen:] == [number(1)]


def test_the_greeting_is_first(connect: Connect) -> None:
    greeting = pb.Hello(version=frames.VERSION, fingerprint="f", bottom=1, top=1)
    service = Echo()
    ask(connect(service, greeting=greeting), number(1))
    assert service.requests == [greeting, number(1)]


def test_a_failing_greeting_raises(connect: Connect) -> None:
    service = Echo(failing(MismatchError("another model", remedy="take ours"), late=False))
    with pytest.raises(MismatchError) as refused:
        connect(service, greeting=number(1))
    assert (refused.value.message, refused.value.remedy) == ("another model", "take ours")


def test_a_malformed_greeting_raises(connect: Connect) -> None:
    with pytest.raises(FrameError):
        connect(Echo(), greeting=pb.Hello(version=99))


@pytest.mark.parametrize("peer", SILOS)
def test_the_service_sees_the_certified_name(connect: Connect, peer: str) -> None:
    service = Echo()
    ask(connect(service, peer), number(1))
    assert set(service.peers) == {peer}


def test_bytes_are_counted_as_sent(connect: Connect) -> None:
    channel = connect(Echo())
    acks = not isinstance(channel, LoopbackChannel)
    for id, body in enumerate([number(1), pb.Ping(), of_size(70_000), *map(number, range(200))], 1):
        sent, received = channel.sent_bytes, channel.received_bytes
        answer = ask(channel, body)
        assert channel.sent_bytes - sent == frames.wrap(body, id=id, acked=id - 1 if acks else 0).ByteSize()
        assert channel.received_bytes - received == frames.wrap(answer, id=id).ByteSize()


def test_frames_of_two_megabytes(connect: Connect) -> None:
    channel = connect(Echo())
    bodies = [pb.Gradient(gradient=pb.Matrix(rows=n, data=random.Random(n).randbytes(2**21))) for n in range(5)]
    answers = [channel.submit(body) for body in bodies]
    assert all(answer.result(HANG) == body for answer, body in zip(answers, bodies, strict=True))


def test_threads_get_their_own_answers_in_their_own_order(connect: Connect) -> None:
    service = Echo()
    channel = connect(service)

    def take_part(thread: int) -> bool:
        mine = [number(1000 * thread + value) for value in range(50)]
        answers = [channel.submit(body) for body in mine]
        return [answer.result(HANG) for answer in answers] == mine

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(take_part, range(4)))
    seen = [body.completed for body in service.requests if isinstance(body, pb.Adapters)]
    assert len(seen) == 200
    assert sorted(seen, key=lambda value: value // 1000) == sorted(seen), "each thread's in its order"


def test_a_closed_grpc_channel_refuses_and_fails_what_is_pending() -> None:
    service = Late()
    with serving({"Trunk": service}) as server:
        channel = joined(server.port)
        pending = channel.submit(number(1))
        channel.close()
        for failed in (lambda: channel.submit(number(2)), lambda: pending.result(HANG)):
            with pytest.raises(PeerGoneError) as gone:
                failed()
            assert gone.value.remedy
        channel.close()
