"""A frame of millions of small parts, which takes many times its bytes once it is parsed, is refused unparsed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from isthmus.errors import FrameError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.parts import MAX_PARTS, SMALL_FRAME
from tests.conformance.test_channels import HANG, TRUNK, Echo, joined, serving
from tests.unit.wire.test_identity import raw_server

SIZE = 32 * 2**20
"""Bytes of a hostile frame."""
ROOM = 16 * 2**20
"""Bytes that reading one may take beside the frame itself; parsed, each takes hundreds of megabytes."""


def field(number: int, data: bytes) -> bytes:
    """A field of bytes, a text, or a message."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def body(kind: type[Message], data: bytes) -> bytes:
    """A frame with the id 1 whose body is of this kind and has these bytes."""
    number = next(one.number for one in pb.Frame.DESCRIPTOR.fields if one.message_type is kind.DESCRIPTOR)
    return b"\x08\x01" + field(number, data)


def many(part: bytes, size: int = SIZE) -> bytes:
    return part * (size // len(part))


def of(kind: type[Message], name: str, data: bytes) -> bytes:
    """A field of such a message, by name."""
    return field(kind.DESCRIPTOR.fields_by_name[name].number, data)


ENTRY = b"\x0a\x00\x12\x00"
FRAMES = {
    "participants": body(pb.Begin, many(of(pb.Begin, "participants", b""))),
    "silos": body(pb.Ready, many(of(pb.Ready, "silos", b"a"))),
    "survivors": body(pb.Survivors, many(of(pb.Survivors, "alive", b""))),
    "tensors": body(pb.Update, many(of(pb.Update, "tensors", b""))),
    "adapters": body(pb.Adapters, many(of(pb.Adapters, "adapters", b"\x0a\x01a"))),
    "shape, packed": body(pb.Update, of(pb.Update, "tensors", of(pb.Tensor, "shape", many(b"\x01")))),
    "shape, one by one": body(pb.Update, of(pb.Update, "tensors", many(b"\x10\x01"))),
    "lengths, packed": body(pb.Forward, of(pb.Forward, "lengths", many(b"\x01"))),
    "lengths, one by one": body(pb.Decode, many(b"\x18\x01")),
    "examples": body(pb.Forward, of(pb.Forward, "examples", bytes(SIZE))),
    "keys": body(pb.Hello, many(of(pb.Hello, "keys", ENTRY))),
    "shares": body(pb.Deal, many(of(pb.Deal, "sealed", ENTRY))),
    "keys of a sum": body(pb.Plan, many(of(pb.Plan, "keys", b"\x0a\x01a" + field(2, b"")))),
    "signatures": body(pb.Agreed, many(of(pb.Agreed, "signatures", ENTRY))),
    "unknown fields": body(pb.Pong, many(b"\xf8\x07\x01")),
    "unknown texts": body(pb.Pong, many(b"\xfa\x07\x00")),
    "bodies": many(body(pb.Ready, b"")),
    "long numbers": body(pb.Begin, many(b"\x92\x80\x80\x80\x00\x80\x80\x00")),
    "then garbage": body(pb.Begin, many(of(pb.Begin, "participants", b"")))[:-1] + b"\xff",
    "groups": body(pb.Begin, many(b"\x93\x01\x94\x01")),
}
"""Frames of 32 MB and what they are made of."""


def peak() -> int:
    """Largest memory of this process since ``forget_peak``, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def forget_peak() -> int:
    """Forget the peak so far. Returns the memory of this process now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


@pytest.mark.parametrize("made_of", FRAMES)
def test_it_is_refused_by_name_in_little_memory(made_of: str) -> None:
    data, before = FRAMES[made_of], forget_peak()
    with pytest.raises(FrameError, match=r"more than 131,072 parts|not a frame") as caught:
        frames.parse(data)
    assert caught.value.remedy
    assert peak() - before < ROOM


def test_the_largest_that_is_accepted_takes_little_memory() -> None:
    for part in (of(pb.Update, "tensors", b""), of(pb.Update, "tensors", b"\x10\x01")):
        data = body(pb.Update, many(part, len(part) * (MAX_PARTS // 3)))
        before = forget_peak()
        frames.parse(data)
        assert peak() - before < 2 * ROOM
    small = body(pb.Begin, many(of(pb.Begin, "participants", b""), SMALL_FRAME - 16))
    assert len(small) <= SMALL_FRAME
    before = forget_peak()
    frames.parse(small)
    assert peak() - before < ROOM


@pytest.mark.parametrize("made_of", ["tensors", "participants", "keys", "shape, packed"])
def test_the_server_goes_on_for_everybody(made_of: str) -> None:
    """The sender's stream ends with the reason; others, and its next stream, are served."""
    service = Echo()
    with serving({"Trunk": service}) as server, closing(joined(server.port, "b")) as good:
        with closing(joined(server.port)) as bad:
            with bad._lock:
                bad._outbox.put(FRAMES[made_of])
            with pytest.raises(FrameError, match="more than 131,072 parts"):
                bad.submit(pb.Ready()).result(HANG)
        assert good.submit(pb.Ping()).result(HANG) == pb.Pong()
        with closing(joined(server.port)) as again:
            assert again.submit(pb.Ping()).result(HANG) == pb.Pong()
        assert not any(isinstance(one, pb.Update | pb.Begin) for one in service.requests)


@pytest.mark.parametrize("made_of", ["adapters", "keys of a sum"])
def test_a_server_floods_no_silo(made_of: str) -> None:
    def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(requests)
        yield frames.wrap(pb.Pong()).SerializeToString()
        next(requests)
        yield FRAMES[made_of]

    with raw_server(stream, TRUNK) as port, closing(joined(port)) as channel:
        before = forget_peak()
        with pytest.raises(FrameError, match="more than 131,072 parts"):
            channel.submit(pb.Ready()).result(HANG)
        assert peak() - before < 4 * SIZE  # the frame on its way through gRPC
