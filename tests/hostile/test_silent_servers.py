"""Servers, and what stands before them, that answer with nothing, with something else, or for another: the channel
ends with a named error or keeps trying, and never hangs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from isthmus.errors import PeerGoneError, ProtocolError
from isthmus.silo.worker import Worker
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, answered
from isthmus.wire.frames import ANSWERS
from tests.conformance.test_channels import HANG, TRUNK, Echo, Late, joined, serving, until
from tests.conftest import save_tiny_model, write_rows
from tests.hostile.served import Served
from tests.unit.wire.test_identity import server_credentials

SOON = 0.4
"""A deadline that tests wait for."""


class Mute:
    """A real gRPC server that accepts every stream, answers the first so many frames with pongs, then nothing."""

    def __init__(self, answers: int) -> None:
        self._answers, self._over = answers, threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(4))
        methods = {"Trunk": grpc.stream_stream_rpc_method_handler(self._stream)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("isthmus.Wire", methods),))
        self.port = self._server.add_secure_port("localhost:0", server_credentials(TRUNK))
        self._server.start()

    def close(self) -> None:
        self._over.set()
        self._server.stop(0).wait()

    def _stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in range(self._answers):
            id = frames.parse(next(requests)).id
            yield frames.wrap(pb.Pong(), id=id).SerializeToString()
        self._over.wait(HANG)


def test_a_server_that_accepts_and_never_greets_is_named() -> None:
    with closing(Mute(0)) as mute, pytest.raises(PeerGoneError, match="has not answered") as caught:
        joined(mute.port, deadline=SOON)
    assert "wire.deadline" in caught.value.remedy


def test_a_server_that_falls_silent_fails_what_waits_and_what_comes() -> None:
    with closing(Mute(1)) as mute, closing(joined(mute.port, deadline=SOON)) as channel:
        waiting = [channel.submit(pb.Ready()), channel.submit(pb.Current())]
        for answer in waiting:
            with pytest.raises(PeerGoneError, match="has not answered"):
                answer.result(HANG)
        with pytest.raises(PeerGoneError, match="has not answered"):
            channel.submit(pb.Ready())


def test_who_waits_for_others_may_wait_as_long_as_pings_are_answered() -> None:
    service = Late()
    with serving({"Trunk": service}) as server, closing(joined(server.port, deadline=SOON)) as channel:
        waiting = channel.submit(pb.Ready())
        time.sleep(3 * SOON)
        assert not waiting.done()
        service.held.pop()[1].set_result(pb.Plan(round=4))
        assert waiting.result(HANG) == pb.Plan(round=4)


def test_a_channel_that_asks_nothing_is_kept_however_long() -> None:
    with serving({"Trunk": Echo()}) as server, closing(joined(server.port, deadline=SOON)) as channel:
        before = channel.sent_bytes
        time.sleep(3 * SOON)
        assert channel.sent_bytes == before
        assert channel.call(pb.Ping()) == pb.Pong()


DUE = [
    pb.Hello(version=frames.VERSION),
    pb.Forward(step=1, lengths=[1], hidden=pb.Matrix(rows=1)),
    pb.Backward(step=1),
    pb.Keep(example=1, hidden=pb.Matrix(rows=1)),
    pb.Decode(session=1, lengths=[1], hidden=pb.Matrix(rows=1)),
    pb.Close(session=1),
    pb.Current(),
    pb.Enroll(),
    pb.Withdrawals(),
    pb.Listing(),
    pb.Fetch(name="config.json"),
    pb.Update(round=1),
]
"""One of each kind whose answer waits for no other party."""
SHARED = [
    pb.Begin(round=1, participants=["a"]),
    pb.Commit(round=1, step=1),
    pb.End(round=1),
    pb.Ready(),
    pb.Update(round=1, masked=b"numbers"),
    pb.Deal(round=1, sealed={"b": b"share"}),
    pb.Agree(round=1, signature=b"signature"),
    pb.Reveal(round=1, shares={"b": b"share"}),
    pb.Move(after=1),
]
"""One of each kind that may wait for others."""


def kinds(request: Message) -> str:
    return type(request).__name__ + (" masked" if isinstance(request, pb.Update) and request.masked else "")


def test_of_every_request_it_is_known_whether_it_waits_for_others() -> None:
    assert {type(one) for one in (*DUE, *SHARED)} == set(ANSWERS) - {pb.Ping}
    assert not any(frames.waits_for_others(one) for one in (*DUE, pb.Ping()))
    assert all(frames.waits_for_others(one) for one in SHARED)


@pytest.mark.parametrize("request_", DUE, ids=kinds)
def test_a_server_that_answers_pings_alone_fails_what_waits_for_nobody_by_name(request_: Message) -> None:
    service = Late()
    with (
        serving({"Trunk": service}) as server,
        closing(joined(server.port, deadline=SOON, answer_deadline=SOON)) as channel,
    ):
        told = f"is there, but has not answered {type(request_).__name__} for"
        with pytest.raises(PeerGoneError, match=told) as caught:
            channel.submit(request_).result(HANG)
        assert "wire.answer_deadline" in caught.value.remedy
        assert channel.call(pb.Ping()) == pb.Pong()  # the channel goes on, and so does the server
        late, service.held = service.held, []
        for _, answer in late:
            answer.set_result(pb.Closed())  # an answer that comes too late is passed over
        service._how = lambda request: answered(pb.Closed())
        assert channel.submit(pb.Close(session=2)).result(HANG) == pb.Closed()


@pytest.mark.parametrize("request_", SHARED, ids=kinds)
def test_what_waits_for_others_waits_on(request_: Message) -> None:
    service = Late()
    with (
        serving({"Trunk": service}) as server,
        closing(joined(server.port, deadline=SOON, answer_deadline=SOON / 4)) as channel,
    ):
        waiting = channel.submit(request_)
        with pytest.raises(PeerGoneError, match="Current"):  # which is asked for later, and is due before
            channel.submit(pb.Current()).result(HANG)
        assert not waiting.done()
        body = ANSWERS[type(request_)][0]()
        service.held[0][1].set_result(body)
        assert waiting.result(HANG) == body


def test_one_answer_that_never_comes_fails_though_all_others_come() -> None:
    """And what was asked after it is not taken for late while it comes."""
    lost = pb.Close(session=99)

    def how(request: Message) -> Answer:
        return Answer() if request == lost else answered(pb.Pong() if isinstance(request, pb.Ping) else pb.Closed())

    with (
        serving({"Trunk": Echo(how)}) as server,
        closing(joined(server.port, answer_deadline=SOON)) as channel,
    ):
        waiting, count = channel.submit(lost), 0
        while not waiting.done():
            assert channel.submit(pb.Close(session=1)).result(HANG) == pb.Closed()
            count += 1
        with pytest.raises(PeerGoneError, match="has not answered Close"):
            waiting.result(HANG)
        assert count > 1


def test_a_queue_of_requests_has_time_for_each() -> None:
    """A request that waits behind its silo's own is not late while those before it are answered in time."""
    service, each = Late(), 3 * SOON
    with serving({"Trunk": service}) as server, closing(joined(server.port, answer_deadline=each)) as channel:
        waiting = [channel.submit(pb.Close(session=number)) for number in range(1, 7)]
        until(lambda: len(service.held) == len(waiting))
        for (_, answer), one in zip(service.held, waiting, strict=True):
            time.sleep(each / 5)
            answer.set_result(pb.Closed())
            assert one.result(HANG) == pb.Closed()


class Breaking:
    """A real gRPC server that greets every stream, takes some frames, and breaks it."""

    def __init__(self) -> None:
        self.streams = 0
        self._server = grpc.server(ThreadPoolExecutor(4))
        methods = {"Trunk": grpc.stream_stream_rpc_method_handler(self._stream)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("isthmus.Wire", methods),))
        self.port = self._server.add_secure_port("localhost:0", server_credentials(TRUNK))
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()

    def _stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self.streams += 1
        next(requests)
        yield frames.wrap(pb.Pong()).SerializeToString()
        time.sleep(SOON / 4)


def test_a_server_that_breaks_every_stream_gains_no_time() -> None:
    with closing(Breaking()) as server, closing(joined(server.port, answer_deadline=2 * SOON)) as channel:
        with pytest.raises(PeerGoneError, match="has not answered Current"):
            channel.submit(pb.Current()).result(HANG)
        assert server.streams > 1


class Front:
    """Answers every connection to a port with these bytes, as a proxy does whose server restarts."""

    def __init__(self, data: bytes) -> None:
        self.asked = threading.Event()
        self._data = data
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                with self._listener.accept()[0] as one:
                    one.recv(4096)
                    one.sendall(self._data)
                self.asked.set()


@pytest.mark.parametrize("data", [b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", b""])
def test_a_proxys_refusal_is_tried_again_until_the_server_is_there(data: bytes) -> None:
    front = Front(data)
    with ThreadPoolExecutor(1) as threads:
        joining = threads.submit(joined, front.port)
        assert front.asked.wait(HANG)
        front.close()
        with serving({"Trunk": Echo()}, address=f"127.0.0.1:{front.port}"), closing(joining.result(HANG)) as channel:
            assert channel.call(pb.Ping()) == pb.Pong()


def test_a_proxy_that_only_refuses_is_named_at_the_deadline() -> None:
    front = Front(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
    with closing(front), pytest.raises(PeerGoneError, match="no connection to trunk"):
        joined(front.port, deadline=SOON)


class Wrong:
    """Answers pings with pongs, and all else with this body."""

    def __init__(self, body: Message) -> None:
        self._body = body

    def handle(self, peer: str, request: Message) -> Answer:
        return answered(pb.Pong() if isinstance(request, pb.Ping) else self._body)


REQUESTS = [
    pb.Begin(round=1, participants=["a"]),
    pb.Commit(round=1, step=1),
    pb.Close(),
    pb.Ready(),
    pb.Update(round=1),
    pb.Current(),
    pb.Enroll(),
    pb.Withdrawals(),
    pb.Listing(),
    pb.Fetch(name="config.json"),
    pb.End(round=1),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_an_answer_of_another_kind_is_named(request_: Message) -> None:
    wrong = pb.Gradient(norm=1.0)
    told = f"{type(request_).__name__} was answered with Gradient; expected {ANSWERS[type(request_)][0].__name__}"
    with serving({"Trunk": Wrong(wrong)}) as server, closing(joined(server.port)) as channel:
        for one in (channel, LoopbackChannel(Wrong(wrong), "a")):
            with pytest.raises(ProtocolError, match=told):
                one.call(request_)
        assert channel.call(pb.Ping()) == pb.Pong()  # and goes on


def test_a_greeting_answered_with_another_kind_ends_the_channel() -> None:
    hello = pb.Hello(version=frames.VERSION)
    told = "Hello was answered with Pong; expected Welcome"
    with serving({"Trunk": Wrong(pb.Pong())}) as server, pytest.raises(ProtocolError, match=told):
        joined(server.port, greeting=hello)


def test_every_request_has_its_answers() -> None:
    """Each body of a frame is a request of the table, an answer to one, or a failure."""
    bodies = {field.message_type.name for field in pb.Frame.DESCRIPTOR.oneofs_by_name["body"].fields}
    answers = {kind.__name__ for kinds in ANSWERS.values() for kind in kinds}
    assert {kind.__name__ for kind in ANSWERS} | answers | {"Failure"} == bodies


@pytest.mark.parametrize("kind", [pb.Forward, pb.Backward, pb.Update], ids=lambda kind: kind.__name__)
def test_a_worker_names_what_is_never_answered_and_goes_on_once_it_is(
    kind: type[Message], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trunk and root are the real ones; for a while they answer all but one kind of request."""
    rows = write_rows(tmp_path / "a.jsonl", [{"prompt": f"w{20 + n}", "answer": f"w{60 + n}"} for n in range(4)])
    model = save_tiny_model("llama", tmp_path / "model", blocks=4)
    silo = [{"name": "a", "train": str(rows)}]
    train = {"rounds": 2, "steps": 1, "batch": 2, "evaluate": False}
    with Served(model, tmp_path, silo=silo, train=train, wire={"answer_deadline": HANG}) as served:
        for service in served.services.values():
            handle = service.handle
            monkeypatch.setattr(
                service, "handle", lambda peer, one, handle=handle: Answer() if type(one) is kind else handle(peer, one)
            )
        hasty = served.recipe.wire.model_copy(update={"answer_deadline": 1.5})
        told = f"has not answered {kind.__name__} for"
        with (
            closing(Worker(served.recipe.model_copy(update={"wire": hasty}), "a", served.run.role("a"))) as worker,
            pytest.raises(PeerGoneError, match=told),
        ):
            worker.run()
        monkeypatch.undo()
        with closing(Worker(served.recipe, "a", served.run.role("a"))) as worker:
            worker.run()
        assert served.run.completed() == 2
