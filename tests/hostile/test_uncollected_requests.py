"""Requests that are answered, refused or cut off, without end: each is let go of at once, not once Python's garbage
collector comes, which in a process of so many objects is gigabytes later."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from types import TracebackType

import grpc
import pytest
import torch

from isthmus.model.checkpoint import Checkpoint
from isthmus.silo.join import greeting
from isthmus.storage.record import RunDirectory
from isthmus.trunk.batches import Evaluation
from isthmus.trunk.decoding import SessionStep
from isthmus.trunk.packed_attention import SequenceCache
from isthmus.trunk.scheduler import Job
from isthmus.trunk.service import TrunkService
from isthmus.trunk.sessions import Session
from isthmus.trunk.training import ForwardStep, OpenStep
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.client import GrpcChannel
from isthmus.wire.inbox import Inbox, Stream
from isthmus.wire.server import Server
from tests.conformance.test_channels import HANG, joined, serving, until
from tests.conftest import make_recipe, save_tiny_model
from tests.hostile.test_many_streams import Raw

KINDS = (Job, Evaluation, SessionStep, Session, SequenceCache, ForwardStep, OpenStep, Inbox, Stream)
SERVED = ("answer_request", "_read", "_turn")
"""Functions of the server through which errors of requests come."""
TIMES = 40
WIDTH = 32
Flood = Callable[[int, pb.Hello], None]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, pb.Hello]]:
    model = save_tiny_model("llama", tmp_path_factory.mktemp("model"), blocks=3)
    recipe = make_recipe(model, silos=("a", "b"), trunk={"sessions": TIMES})
    service = TrunkService(recipe, RunDirectory(tmp_path_factory.mktemp("run")).role("trunk"))
    with serving({"Trunk": service}) as server:
        yield server, greeting(Checkpoint(recipe.model.path), recipe)
    service.stop()


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def rows(count: int) -> pb.Matrix:
    return codec.encode(torch.ones(count, WIDTH), "fp32")


def asked(channel: GrpcChannel, request: pb.Forward | pb.Decode) -> None:
    channel.submit(request).exception(HANG)


def evaluations(port: int, hello: pb.Hello) -> None:
    with closing(joined(port, "b", greeting=hello)) as channel:
        for step in range(TIMES):
            asked(channel, pb.Forward(step=step, lengths=[5], hidden=rows(5)))


def sessions(port: int, hello: pb.Hello) -> None:
    with closing(joined(port, "b", greeting=hello)) as channel:
        for session, step in itertools.product(range(1, TIMES // 2), range(2)):
            asked(channel, pb.Decode(session=session, step=step, lengths=[1], hidden=rows(1)))
        for session in range(1, TIMES // 2):
            channel.submit(pb.Close(session=session)).result(HANG)


def steps_of_no_session(port: int, hello: pb.Hello) -> None:
    with closing(joined(port, "b", greeting=hello)) as channel:
        for session in range(1, TIMES):
            asked(channel, pb.Decode(session=session, step=7, lengths=[1], hidden=rows(1)))


def malformed(port: int, hello: pb.Hello) -> None:
    with closing(joined(port, "b", greeting=hello)) as channel:
        for step in range(TIMES):
            asked(channel, pb.Forward(step=step, lengths=[7], hidden=rows(5)))


def steps_out_of_order(port: int, hello: pb.Hello) -> None:
    with closing(joined(port, "b", greeting=hello)) as channel:
        for _ in range(TIMES):
            asked(channel, pb.Forward(step=0, lengths=[5], hidden=rows(5), train=True))


def cut_off(port: int, hello: pb.Hello) -> None:
    for number in range(TIMES // 4):
        with closing(Raw(port, instance=f"c{number}")) as raw:
            raw.send(hello)
            raw.read()
            for id in range(1, 4):
                raw.send(pb.Forward(step=id, lengths=[5], hidden=rows(5)), id=id)


def no_frames(port: int, hello: pb.Hello) -> None:
    for number in range(TIMES // 4):
        with closing(Raw(port, instance=f"n{number}")) as raw:
            raw._outbox.put(b"\xff" * 100_000)
            with suppress(grpc.RpcError):
                raw.read()


def alive() -> Counter[object]:
    """What there is of requests and streams, and of the errors in answer to them, with all that their frames hold."""
    return Counter(kind for one in gc.get_objects() if (kind := kept(one)) is not None)


def kept(one: object) -> object:
    if type(one) is TracebackType:
        name = one.tb_frame.f_code.co_name
        return name if name in SERVED else None
    return type(one) if type(one) in KINDS else None


@pytest.mark.parametrize(
    "flood", [evaluations, sessions, steps_of_no_session, malformed, steps_out_of_order, cut_off, no_frames]
)
def test_what_is_over_is_let_go_of_at_once(flood: Flood, trunk: tuple[Server, pb.Hello], uncollected: None) -> None:
    server, hello = trunk

    def as_its_next_process() -> None:
        with closing(joined(server.port, "b", greeting=hello)) as channel:
            asked(channel, pb.Forward(lengths=[5], hidden=rows(5)))

    as_its_next_process()
    gc.collect()
    before = alive()
    flood(server.port, hello)
    as_its_next_process()
    until(lambda: server.held("Trunk", "b") < 10_000)
    until(lambda: sum((alive() - before).values()) <= 6)
    with closing(joined(server.port, "a", greeting=hello)) as good:
        assert good.submit(pb.Forward(lengths=[5], hidden=rows(5))).result(HANG)
