"""Frames in chunks: what goes in is what comes out, and nothing else is taken."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import FrameError, FrameSizeError, PeerGoneError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.chunks import FRAME_CHUNK, OVERHEAD, Assembler, in_chunks
from isthmus.wire.client import GrpcChannel
from isthmus.wire.server import KEEPALIVE
from tests.conformance.test_channels import AUTHORITY, HANG, Echo, serving
from tests.unit.wire.test_identity import Forwarder

LIMIT = 2**22


def frame_of(size: int) -> bytes:
    return frames.wrap(pb.Update(round=1, masked=bytes(size)), id=7).SerializeToString()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 3 * FRAME_CHUNK), min_size=1, max_size=4))
def test_frames_come_out_as_they_went_in(sizes: list[int]) -> None:
    assembler, sent = Assembler(LIMIT), [frame_of(size) for size in sizes]
    messages = [chunk for data in sent for chunk in in_chunks(data)]
    assert all(len(one) <= FRAME_CHUNK + OVERHEAD for one in messages)
    assert [whole for one in messages if (whole := assembler.add(one)) is not None] == sent


def test_a_small_frame_is_its_own_message() -> None:
    assert list(in_chunks(frame_of(9))) == [frame_of(9)]


def test_what_is_not_the_next_chunk_is_refused() -> None:
    first, second, third = in_chunks(frame_of(3 * FRAME_CHUNK - 100))
    for before, after in pairwise((first, third)):
        assembler = Assembler(LIMIT)
        assert assembler.add(before) is None
        with pytest.raises(FrameError, match="not the next one"):
            assembler.add(after)
    assembler = Assembler(LIMIT)
    assembler.add(first)
    with pytest.raises(FrameError, match="of another one are to come"):
        assembler.add(frame_of(1))
    with pytest.raises(FrameError, match="not the next one"):
        Assembler(LIMIT).add(b"\x1a\x00")
    with pytest.raises(FrameError, match="not the next one"):
        Assembler(LIMIT).add(pb.Frame(chunk=b"a", left=5).SerializeToString())  # many small ones would take much memory
    assert second


def test_a_frame_beyond_the_limit_is_refused_at_its_first_chunk() -> None:
    with pytest.raises(FrameSizeError):
        Assembler(FRAME_CHUNK).add(next(in_chunks(frame_of(FRAME_CHUNK + 1))))
    with pytest.raises(FrameError, match="a chunk of"):
        Assembler(LIMIT).add(pb.Frame(chunk=bytes(2 * FRAME_CHUNK)).SerializeToString())


@pytest.mark.parametrize("endless", [False, True])
def test_a_frame_that_takes_several_deadlines_arrives_both_ways_while_its_bytes_flow(endless: bool) -> None:
    deadline, size, rate = 3.0, 1_500_000, 160_000.0
    service = Echo()
    with serving({"Trunk": service}) as server, closing(Forwarder(server.port)) as line:
        address = f"localhost:{line.port}"
        options = {"deadline": deadline, "answer_deadline": 2 * deadline, "endless": endless}
        with closing(GrpcChannel(address, "Trunk", AUTHORITY.issue("a"), **options)) as channel:  # type: ignore[arg-type]
            line.rate = rate
            sent, before = pb.Gradient(norm=1.0, gradient=pb.Matrix(rows=1, data=bytes(size))), time.monotonic()
            answer = channel.submit(sent).result(HANG)
            took = time.monotonic() - before
    assert answer == sent
    assert took > 2 * size / rate > 3 * deadline
    assert len([one for one in service.requests if isinstance(one, pb.Gradient)]) == 1, "sent once"


def test_a_line_that_falls_silent_within_a_frame_is_noticed() -> None:
    with serving({"Trunk": Echo()}) as server, closing(Forwarder(server.port)) as line:
        options = {"deadline": 2.0}
        with closing(GrpcChannel(f"localhost:{line.port}", "Trunk", AUTHORITY.issue("a"), **options)) as channel:  # type: ignore[arg-type]
            line.rate = 160_000.0
            answer = channel.submit(pb.Gradient(norm=1.0, gradient=pb.Matrix(rows=1, data=bytes(1_500_000))))
            threading.Timer(3.0, line.vanish).start()
            with pytest.raises(PeerGoneError, match="has not answered"):
                answer.result(HANG)


def test_a_ping_may_wait_behind_what_the_network_holds() -> None:
    assert dict(KEEPALIVE)["grpc.keepalive_timeout_ms"] >= 4 * 2**20 * 8 / 1e6 * 1000, "4 MiB at 1 Mbit/s"
