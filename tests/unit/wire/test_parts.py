"""The number of a frame's parts: as its parsed fields have it, to the last one; and bytes of any kind end by name."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import FrameError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.parts import SMALL_FRAME, check_parts
from tests.unit.wire.test_frames import KINDS, SEEDS, changed, extreme, fuzz

PAD = b"\xc2\x3e" + b"\x80\x80\x04" + bytes(SMALL_FRAME)
"""One unknown field, which makes a frame large enough to be counted."""
TEXT = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
FIXED = {FieldDescriptor.TYPE_FIXED64: 8, FieldDescriptor.TYPE_FIXED32: 4}


def parts(message: Message) -> int:
    """The slow count, of the parsed message."""
    return sum(parts_of(field, value) for field, value in message.ListFields())


def parts_of(field: FieldDescriptor, value: Any) -> int:
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        nested = inner.fields_by_name["value"].message_type is not None
        return sum(3 + (parts(value[key]) if nested else 0) for key in value)
    many = value if field.is_repeated else [value]
    if inner is not None:
        return sum(1 + parts(one) for one in many)
    if not field.is_repeated:
        return 1
    if field.type in TEXT:
        return len(value)
    return 1 + sum(FIXED.get(field.type) or max(1, -(-one.bit_length() // 7)) for one in value)


@settings(fuzz, max_examples=2_000)
@given(st.sampled_from(sorted(KINDS)), SEEDS)
def test_as_many_are_counted_as_there_are(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    body = extreme(draw, changed(kind), draw.choice((0.1, 0.3, 0.9)))
    frame = frames.wrap(body, id=draw.choice((0, 1, 2**63)))
    data, count = frame.SerializeToString() + PAD, parts(frame) + 1
    check_parts(data, count)
    with pytest.raises(FrameError, match=f"more than {count - 1:,} parts") as caught:
        check_parts(data, count - 1)
    assert caught.value.remedy


@settings(fuzz, max_examples=2_000)
@given(st.sampled_from(sorted(KINDS)), SEEDS)
def test_what_is_cut_or_changed_ends_by_name_or_counts(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    data = bytearray(frames.wrap(changed(kind), id=1).SerializeToString())
    for _ in range(draw.randint(1, 3)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    whole = PAD + bytes(data)
    with suppress(FrameError):
        check_parts(whole[: len(whole) - draw.randint(0, 5)])


@pytest.mark.parametrize("wire", [3, 4, 6, 7])
def test_kinds_of_fields_that_no_frame_has_are_refused(wire: int) -> None:
    with pytest.raises(FrameError, match="not a frame"):
        check_parts(PAD + bytes((1 << 3 | wire,)))


def test_an_honest_frame_of_any_size_has_few_parts() -> None:
    matrix = pb.Matrix(codec="fp32", rows=4096, width=2048, data=bytes(32 * 2**20))
    frame = frames.wrap(pb.Forward(step=1, lengths=[1] * 4096, hidden=matrix), id=1)
    check_parts(frame.SerializeToString(), 4096 + 16)
    tensors = [
        pb.Tensor(name=f"model.layers.{number}.weight", shape=[64, 512], data=bytes(2**17)) for number in range(200)
    ]
    check_parts(frames.wrap(pb.Update(round=1, weight=1.0, tensors=tensors), id=1).SerializeToString(), 2_000)


def test_a_sum_of_as_many_silos_as_a_round_may_have_is_within_the_bound() -> None:
    names = [f"silo-{number}" for number in range(frames.MAX_SEQUENCES)]
    part = bytes(32)
    keys = pb.SumKeys(sealing=part, masking=part, commitment=part, certificate=bytes(700), signature=bytes(72))
    plan = pb.Plan(round=1, participants=names, keys=dict.fromkeys(names, keys), counted=dict.fromkeys(names, 1))
    check_parts(frames.wrap(plan, id=1).SerializeToString())
    deal = pb.Deal(round=1, sealed=dict.fromkeys(names, bytes(96)), commitments=dict.fromkeys(names, bytes(64)))
    check_parts(frames.wrap(deal, id=1).SerializeToString())
    hello = pb.Hello(keys={f"silo.{name}.{key}": "1" for name in names for key in ("name", "rank", "steps")})
    check_parts(frames.wrap(hello, id=1).SerializeToString())
