"""Frames: every rule, and that bytes of any kind end in ``FrameError`` or a checked frame, never in another error."""

from __future__ import annotations

import math
import random
from contextlib import suppress
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.errors import FrameError, IsthmusError, MismatchError
from isthmus.wire import codec, frames
from isthmus.wire import isthmus_pb2 as pb

WIDTH = 2
KINDS = {field.name: field.message_type for field in pb.Frame.DESCRIPTOR.oneofs_by_name["body"].fields}
UINTS = [0, 1, 2, 3, 7, 4096, 4097, 2**17, 2**17 + 1, 2**31, 2**32 - 1]
DOUBLES = [0.0, -0.0, 1.0, -1.0, 5e-324, 1e308, math.nan, math.inf, -math.inf]
TEXTS = ["", "a", "fp32", "bf16", "fp16", "int8", "int4", "int4+zstd", "fp64", "é" * 50, "x" * 3000, "\0"]
COUNTS = [0, 1, 1, 2, 2, 3, 60]
SEEDS = st.integers(0, 2**63)


def matrix(rows: int) -> pb.Matrix:
    return pb.Matrix(codec="fp32", rows=rows, width=WIDTH, data=bytes(4 * rows * WIDTH))


def tensor(name: str = "a") -> pb.Tensor:
    return pb.Tensor(name=name, shape=[2, 3], data=bytes(24))


def keys(**parts: bytes) -> pb.SumKeys:
    whole = dict.fromkeys(("sealing", "masking", "commitment"), bytes(32)) | {"certificate": b"c", "signature": b"s"}
    return pb.SumKeys(**(whole | parts))


VALID: dict[str, Message] = {
    "hello": pb.Hello(version=frames.VERSION, fingerprint="f" * 64, bottom=1, top=1, ends=0, instance="i"),
    "welcome": pb.Welcome(completed=2, training=True, run="r"),
    "failure": pb.Failure(code="mismatch", message="no", remedy="do"),
    "ping": pb.Ping(compared=pb.Hello(version=frames.VERSION)),
    "pong": pb.Pong(time=1.5, welcome=pb.Welcome(completed=2, run="r")),
    "begin": pb.Begin(round=1, participants=["a", "b"]),
    "begun": pb.Begun(),
    "forward": pb.Forward(step=1, lengths=[2, 3], hidden=matrix(5), train=True),
    "hidden": pb.Hidden(hidden=matrix(5)),
    "backward": pb.Backward(step=1, gradient=matrix(5), reply=True, ascent_pass=True),
    "gradient": pb.Gradient(gradient=matrix(5)),
    "commit": pb.Commit(round=1, step=1, weight=3.0),
    "stepped": pb.Stepped(contributors=2),
    "keep": pb.Keep(example=2**64 - 1, hidden=matrix(5)),
    "kept": pb.Kept(),
    "end": pb.End(round=1),
    "ended": pb.Ended(),
    "move": pb.Move(after=2, tensors=[tensor()]),
    "moved": pb.Moved(after=2, tensors=[tensor()]),
    "decode": pb.Decode(session=1, step=1, lengths=[1, 2], hidden=matrix(3), forget=1, rows=[1, 0]),
    "close": pb.Close(session=1),
    "closed": pb.Closed(),
    "ready": pb.Ready(completed=2, keys=keys(), run="r"),
    "plan": pb.Plan(
        round=3,
        completed=2,
        participants=["a"],
        adapters=[tensor()],
        sum=b"s",
        keys={"a": keys()},
        control=[tensor()],
        counted={"a": 2},
        clip=0.5,
    ),
    "update": pb.Update(round=3, weight=1.5, tensors=[tensor()], quality=0.5),
    "accepted": pb.Accepted(),
    "current": pb.Current(),
    "adapters": pb.Adapters(completed=2, adapters=[tensor()], run="r"),
    "deal": pb.Deal(round=3, sealed={"b": bytes(82)}),
    "dealt": pb.Dealt(sealed={"a": bytes(82)}),
    "survivors": pb.Survivors(alive=["a"], dropped=["b"]),
    "agree": pb.Agree(round=3, signature=b"s"),
    "agreed": pb.Agreed(signatures={"a": b"s"}),
    "reveal": pb.Reveal(round=3, shares={"a": bytes(33)}),
    "enroll": pb.Enroll(request=b"r"),
    "enrolled": pb.Enrolled(certificate=b"c", authority=b"a", revoked=b"l", recipe="[model]"),
    "withdrawals": pb.Withdrawals(),
    "withdrawn": pb.Withdrawn(revoked=b"l"),
    "listing": pb.Listing(),
    "listed": pb.Listed(files=[pb.File(name="start/a.json", size=3, digest="d")], fingerprint="f"),
    "fetch": pb.Fetch(name="config.json", offset=2**40),
    "fetched": pb.Fetched(data=b"d"),
}
SERIALIZED = [frames.wrap(body, id=5, acked=3).SerializeToString() for body in VALID.values()]


def changed(kind: str, **fields: Any) -> Message:
    """The valid body of this kind with other values in some fields."""
    body = type(VALID[kind])()
    body.CopyFrom(VALID[kind])
    for name, value in fields.items():
        body.ClearField(name)
        if value is None:
            continue
        if isinstance(value, dict):
            getattr(body, name).update(value)
        elif isinstance(value, (list, Message)):
            getattr(body, name).MergeFrom(value)
        else:
            setattr(body, name, value)
    return body


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_frame_of_every_kind_passes(kind: str) -> None:
    frame = frames.parse(frames.wrap(VALID[kind], id=7, acked=6).SerializeToString())
    assert frames.checked(frame) == VALID[kind]
    assert (frame.id, frame.acked) == (7, 6)


BROKEN = [
    ("hello", {"version": 0}, "protocol version 0"),
    ("hello", {"version": frames.VERSION + 1}, "protocol version"),
    ("hello", {"instance": "i" * 65}, "65 characters"),
    ("welcome", {"run": "r" * 65}, "65 characters"),
    ("ping", {"compared": pb.Hello(version=frames.VERSION + 1)}, "protocol version"),
    ("pong", {"welcome": pb.Welcome(run="r" * 65)}, "65 characters"),
    *(("pong", {"time": time}, "the time") for time in (-1.0, math.inf, math.nan)),
    ("ready", {"run": "r" * 65}, "65 characters"),
    ("adapters", {"run": "r" * 65}, "65 characters"),
    ("begin", {"round": 0}, "round 0"),
    ("begin", {"participants": []}, "0 participants"),
    ("begin", {"participants": ["a"] * 4097}, "4097 participants"),
    ("commit", {"round": 0}, "round 0"),
    ("commit", {"step": 0}, "step 0"),
    ("end", {"round": 0}, "round 0"),
    ("update", {"round": 0}, "round 0"),
    ("decode", {"step": 0, "rows": []}, "something to forget"),
    ("decode", {"step": 0, "forget": 0}, "something to forget"),
    ("decode", {"step": 0, "forget": 0, "rows": [], "drafted": True}, "or with drafts"),
    ("decode", {"rows": [0]}, "differ in number"),
    ("decode", {"rows": [0, 1, 2]}, "differ in number"),
    ("decode", {"rows": [0] * 4097}, "4097 rows"),
]
BROKEN += [
    (kind, {"weight": weight}, "weight")
    for kind in ("commit", "update")
    for weight in (-5e-324, -1.0, math.nan, math.inf, -math.inf)
]
BROKEN += [("gradient", {"norm": norm}, "the norm") for norm in (-5e-324, -1.0, math.nan, math.inf)]
BROKEN += [
    (kind, change, told)
    for kind in ("forward", "decode")
    for change, told in [
        ({"lengths": [], "hidden": matrix(0)}, "0 sequences"),
        ({"lengths": [1] * 4097, "hidden": matrix(4097)}, "4097 sequences"),
        ({"lengths": [5, 0], "hidden": matrix(5)}, "a sequence without a token"),
        ({"lengths": [2**17 + 1], "hidden": pb.Matrix(rows=2**17 + 1)}, "a batch of 131073 positions"),
        ({"lengths": [2**32 - 1, 2], "hidden": pb.Matrix(rows=1)}, "a batch of 8589934590 positions"),
        ({"lengths": [2, 3], "hidden": matrix(4)}, "4 rows for sequences of 5"),
        ({"lengths": [2, 3], "hidden": matrix(6)}, "6 rows for sequences of 5"),
        ({"hidden": pb.Matrix()}, "0 rows"),
        ({"lengths": [1] * 4000 + [33], "hidden": matrix(4033)}, "a batch of 132033 positions"),  # small on the wire
    ]
]
BROKEN += [
    ("forward", {"examples": [1, 2]}, "hidden states beside"),
    ("forward", {"answered": [1, 2]}, "digests of answers without"),
    ("forward", {"examples": [1, 2], "answered": [1], "hidden": None}, "1 digests of answers for 2"),
    ("hidden", {"changed": [1, 0], "changes": matrix(2)}, "in no order"),
    ("hidden", {"changed": [1, 1], "changes": matrix(2)}, "in no order"),
    ("hidden", {"changed": list(range(4097)), "changes": matrix(4097)}, "too many"),
    ("hidden", {"changed": [0]}, "without changes"),
    ("hidden", {"changes": matrix(2)}, "changes of none"),
    ("forward", {"examples": [1, 2], "hidden": pb.Matrix()}, "hidden states beside"),
    ("backward", {"reply": False}, "neither learned from nor answered"),
    ("keep", {"hidden": pb.Matrix()}, "an example of 0 tokens"),
    ("keep", {"hidden": pb.Matrix(rows=2**17 + 1)}, "an example of 131073 tokens"),
]
BROKEN += [("enroll", {"request": b"r" * 8193}, "8193 bytes"), ("listed", {"files": [pb.File()] * 1025}, "1025 files")]
BROKEN += [
    (kind, fields(name), "of a file")
    for kind, fields in (
        ("fetch", lambda name: {"name": name}),
        ("listed", lambda name: {"files": [pb.File(name=name)]}),
    )
    for name in ("", "/etc/passwd", "../key.pem", "a/../b", "a//b", "a\\b", ".", "a\0b", "n" * 1025)
]
ADAM = {"kind": "adam", "learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8}
BROKEN += [
    ("begin", {"open": True}, "an open round with a number"),
    ("begin", {"start": 3}, "a start of its own"),
    ("begin", {"open": True, "round": 0, "digest": bytes(31)}, "a digest of 31 bytes"),
    ("backward", {"keep": math.nan}, "the factor nan"),
    ("commit", {"scale": math.inf}, "the factor inf"),
    ("commit", {"optimizer": pb.Optimizer(kind="lion")}, "kind 'lion'"),
    ("commit", {"optimizer": pb.Optimizer(**ADAM | {"beta1": 1.0})}, "beta1 is 1"),
    ("commit", {"optimizer": pb.Optimizer(kind="sgd", nesterov=True)}, "Nesterov"),
    *(
        ("commit", {"optimizer": pb.Optimizer(**ADAM | {"learning_rate": rate})}, "learning_rate")
        for rate in (-1.0, math.nan, math.inf)
    ),
]
BROKEN += [
    ("ready", {"keys": keys(sealing=bytes(31))}, "a key of 31 bytes"),
    ("ready", {"keys": keys(masking=b"")}, "a key of 0 bytes"),
    ("ready", {"keys": keys(commitment=bytes(33))}, "a key of 33 bytes"),
    ("ready", {"keys": keys(certificate=b"")}, "of 0 bytes"),
    ("ready", {"keys": keys(signature=bytes(8193))}, "of 8193 bytes"),
    ("update", {"masked": b"m", "tensors": None, "quality": 0.5}, "a quality beside a masked"),
    ("update", {"masked": b"m", "tensors": None, "quality": 0.0}, "a weight beside a masked"),
    ("update", {"learned": True}, "beside no masked update"),
    ("update", {"silos": 3}, "beside no masked update"),
    ("agree", {"round": 0}, "round 0"),
    ("agree", {"signature": b""}, "a signature of 0 bytes"),
    ("deal", {"commitments": {"b": b"short"}}, "a commitment of other than 64 bytes"),
    (
        "update",
        {"masked": b"m", "tensors": None, "quality": 0.0, "weight": 0.0, "learned": True, "silos": 3},
        "of many",
    ),
    ("update", {"masked": b"m", "tensors": None, "quality": 0.0, "weight": 0.0, "silos": 2**20 + 1}, "1048577 silos"),
    *(("update", {"quality": quality}, "quality") for quality in (-1e-9, 1.01, math.nan, math.inf)),
    ("update", {"masked": b"m"}, "more than one form"),
    ("update", {"compressed": b"c"}, "more than one form"),
    ("update", {"tensors": [], "masked": b"m", "compressed": b"c"}, "more than one form"),
    ("deal", {"round": 0}, "round 0"),
    ("deal", {"sealed": {}}, "0 shares"),
    ("deal", {"sealed": {"b": bytes(257)}}, "a share of 257 bytes"),
    ("deal", {"sealed": {str(number): b"s" for number in range(4097)}}, "4097 shares"),
    ("reveal", {"round": 0}, "round 0"),
    ("reveal", {"shares": {}}, "0 shares"),
    ("reveal", {"shares": {"b": bytes(257)}}, "a share of 257 bytes"),
]
BROKEN += [
    ("forward", {"hidden": None, **change}, told)
    for change, told in [
        ({}, "0 rows for sequences of 5"),
        ({"examples": [1]}, "1 examples for 2 sequences"),
        ({"examples": [1, 2, 3]}, "3 examples for 2 sequences"),
        ({"examples": [1], "lengths": []}, "0 sequences"),
        ({"examples": [7] * 4097, "lengths": [1] * 4097}, "4097 sequences"),
        ({"examples": [1, 2], "lengths": [5, 0]}, "a sequence without a token"),
        ({"examples": [1, 2], "lengths": [2**17, 1]}, "a batch of 262144 positions"),
    ]
]


@pytest.mark.parametrize(("kind", "change", "told"), BROKEN)
def test_a_broken_rule_is_refused(kind: str, change: dict[str, Any], told: str) -> None:
    frame = frames.parse(frames.wrap(changed(kind, **change)).SerializeToString())
    with pytest.raises(FrameError, match=told) as refused:
        frames.checked(frame)
    assert refused.value.remedy


def test_every_rule_is_tested() -> None:
    assert {kind for kind, _, _ in BROKEN} == frames._RULES.keys()
    assert VALID.keys() == KINDS.keys()


@pytest.mark.parametrize(
    "body",
    [
        changed("decode", step=0, forget=0, rows=[]),
        changed("decode", rows=[]),
        changed("forward", lengths=[1] * 4096, hidden=matrix(4096)),
        changed("forward", lengths=[2**17], hidden=pb.Matrix(rows=2**17)),
        changed("forward", hidden=None, lengths=[1] * 4096, examples=[7] * 4096),
        changed("keep", example=0, hidden=pb.Matrix(rows=2**17)),
        changed("commit", weight=5e-324),
        changed("commit", weight=0.0),
        pb.Update(round=3, weight=0.0),
        pb.Update(round=3, weight=1.0, compressed=b"c"),
        pb.Update(round=3, learned=True, masked=b"m"),
        pb.Update(round=3, silos=2**20, masked=b"m"),
        changed("begin", participants=["a"] * 4096),
        changed("backward", reply=False, ascent_pass=False),
    ],
)
def test_what_just_keeps_the_rules_passes(body: Message) -> None:
    frames.checked(frames.wrap(body))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        pb.Frame(id=3).SerializeToString(),
        b"\x98\x06\x01",  # field 99, a number
        b"\xea\x05\x00",  # field 93, an empty message: a body of a later version
        b"\x50\x01",  # hello as a number
    ],
)
def test_a_frame_without_a_known_body_is_refused(data: bytes) -> None:
    frame = frames.parse(data)
    with pytest.raises(FrameError, match="without a body"):
        frames.checked(frame)


@pytest.mark.parametrize(
    "data", [b"\xff", b"\x0a", b"\x52\x05", b"GET / HTTP/1.1\r\n", b"\x52\x03\x12\x01\xff", bytes(9)]
)
def test_bytes_that_are_no_frame_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError, match=f"{len(data)} bytes") as refused:
        frames.parse(data)
    assert refused.value.remedy


@pytest.mark.parametrize("kind", [IsthmusError, FrameError, MismatchError])
def test_an_error_comes_back_as_it_was(kind: type[IsthmusError]) -> None:
    back = frames.reported_error(frames.failure(kind("what é\n", remedy="do")))
    assert type(back) is kind
    assert (back.message, back.remedy) == ("what é\n", "do")


@pytest.mark.parametrize("code", ["", "of a later version", "__class__"])
def test_an_unknown_code_becomes_the_base_error(code: str) -> None:
    back = frames.reported_error(pb.Failure(code=code, message="what", remedy="do"))
    assert type(back) is IsthmusError
    assert (back.message, back.remedy) == ("what", "do")


def receive(data: bytes) -> None:
    """What any receiver does with bytes: nothing but ``FrameError`` may come of it."""
    with suppress(FrameError):
        frame = frames.parse(data)
        read(frames.checked(frame))


def read(body: Any) -> None:
    """Decode the tensors of a checked body, with what a receiver expects and with what the sender claims."""
    fields = {field.name for field in type(body).DESCRIPTOR.fields}
    for name in fields & {"hidden", "gradient"}:
        sent = getattr(body, name)
        rows = sum(body.lengths) if "lengths" in fields else 5
        claims = [(rows, WIDTH, "fp32")]
        claims += [(sent.rows, sent.width, sent.codec)] if sent.codec in codec.CODEC_NAMES else []
        for rows, width, agreed in claims:
            with suppress(FrameError):
                assert codec.decode(sent, rows=rows, width=width, codec=agreed).shape == (rows, width)
    for name in fields & {"adapters", "control", "tensors"}:
        sent = getattr(body, name)
        for expected in ({"a": (2, 3)}, {claim.name: tuple(claim.shape) for claim in sent}):
            with suppress(FrameError):
                assert codec.decode_named(sent, expected).keys() == expected.keys()


def mutated(draw: random.Random) -> bytes:
    """A valid frame with some bytes changed, cut out, doubled, or of another frame."""
    data = bytearray(draw.choice(SERIALIZED))
    for _ in range(draw.randrange(1, 5)):
        where = draw.randrange(len(data) + 1)
        edit = draw.randrange(5)
        if edit == 0:
            data[where : where + 1] = draw.randbytes(1)
        elif edit == 1:
            del data[where:]
        elif edit == 2:
            del data[where : where + draw.randrange(4)]
        elif edit == 3:
            data[where:where] = data[where : where + draw.randrange(9)]
        else:
            data[where:] = draw.choice(SERIALIZED)[where:]
    return bytes(data)


def extreme(draw: random.Random, message: Message, share: float) -> Message:
    """This message with extreme values in this share of its fields, however deep."""
    for field in message.DESCRIPTOR.fields:
        if field.containing_oneof is not None or draw.random() > share:
            continue
        if field.is_repeated:
            fill(draw, getattr(message, field.name), field, share)
        elif field.message_type is not None:
            extreme(draw, getattr(message, field.name), share).SetInParent()
        else:
            setattr(message, field.name, scalar(draw, field))
    return message


def fill(draw: random.Random, values: Any, field: FieldDescriptor, share: float) -> None:
    entry = field.message_type
    for _ in range(draw.choice(COUNTS)):
        if entry is not None and entry.GetOptions().map_entry:
            key, value = draw.choice(TEXTS), entry.fields_by_name["value"]
            if value.message_type is not None:
                extreme(draw, values[key], share)
            else:
                values[key] = scalar(draw, value)
        elif entry is not None:
            extreme(draw, values.add(), share)
        else:
            values.append(scalar(draw, field))


def scalar(draw: random.Random, field: FieldDescriptor) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return draw.choice(TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return draw.randbytes(draw.choice((0, 1, 2, 4, 8, 24, 40)))
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return draw.choice(DOUBLES)
    if field.type in (FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64):
        return draw.choice([*UINTS, 2**63, 2**64 - 1])
    return draw.choice(UINTS) if field.type == FieldDescriptor.TYPE_UINT32 else draw.random() < 0.5


fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)


@settings(fuzz, max_examples=4_000)
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    receive(data)


@settings(fuzz, max_examples=9_000)
@given(SEEDS)
def test_mutated_frames(seed: int) -> None:
    receive(mutated(random.Random(seed)))


@settings(fuzz, max_examples=9_000)
@given(st.sampled_from(sorted(KINDS)), SEEDS)
def test_frames_of_extreme_values(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    body = extreme(draw, changed(kind), draw.choice((0.1, 0.3, 0.9)))
    receive(frames.wrap(body, id=draw.choice(UINTS), acked=draw.choice(UINTS)).SerializeToString())
