"""Frames: their construction, parsing and checks. Every received frame is checked before anything acts on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from isthmus.errors import FrameError, IsthmusError, by_code
from isthmus.wire import isthmus_pb2 as pb

VERSION = 1
"""Version of the protocol."""
MAX_SEQUENCES = 4096
MAX_SILOS = 2**20
"""Silos in one sum."""
MAX_POSITIONS = 2**17
"""Largest padded size of a frame's batch: number of sequences times the longest length."""
KEY_BYTES = 32
MAX_CERTIFICATE = 8192
"""Largest certificate or signature in bytes."""
MAX_SHARE = 256
"""Largest encrypted share in bytes."""
_REMEDY = "both sides must run the same version of isthmus"
_FIELDS = {field.message_type: field.name for field in pb.Frame.DESCRIPTOR.oneofs_by_name["body"].fields}


def wrap(body: Message, *, id: int = 0, acked: int = 0) -> pb.Frame:
    """A frame with this body.

    Args:
        acked: the highest id up to which the sender has received all answers.
    """
    frame = pb.Frame(id=id, acked=acked)
    room = getattr(frame, _FIELDS[body.DESCRIPTOR])
    room.SetInParent()
    room.CopyFrom(body)  # passed to Frame's constructor it would be serialized and parsed
    return frame


def parse(data: bytes) -> pb.Frame:
    """The frame in these bytes, not checked yet.

    Raises:
        FrameError: the bytes are not a frame.
    """
    try:
        return pb.Frame.FromString(data)
    except (DecodeError, UnicodeDecodeError) as error:
        raise FrameError(f"received {len(data)} bytes that are not a frame", remedy=_REMEDY) from error


def body(frame: pb.Frame) -> Any:
    """The message in a frame."""
    return getattr(frame, str(frame.WhichOneof("body")))


def check(frame: pb.Frame) -> None:
    """Raise ``FrameError`` unless the frame has a body that satisfies all checks that do not depend on the model."""
    kind = frame.WhichOneof("body")
    if kind is None:
        raise FrameError("received a frame without a body", remedy=_REMEDY)
    if rule := _RULES.get(kind):
        rule(body(frame))


def failure(error: IsthmusError) -> pb.Failure:
    """The body that reports an error to the peer."""
    return pb.Failure(code=error.code, message=error.message, remedy=error.remedy)


def reported_error(received: pb.Failure) -> IsthmusError:
    """The error that a peer reported with ``failure``."""
    return by_code(received.code)(received.message, remedy=received.remedy)


def _require(valid: bool, problem: str) -> None:
    if not valid:
        raise FrameError(f"received {problem}", remedy=_REMEDY)


def _lengths(message: Any) -> None:
    """The batch is valid and has one hidden state for each token."""
    _batch(message)
    rows = sum(message.lengths)
    _require(message.hidden.rows == rows, f"{message.hidden.rows} rows for sequences of {rows} tokens")


def _batch(message: Any) -> None:
    _require(0 < len(message.lengths) <= MAX_SEQUENCES, f"{len(message.lengths)} sequences in one frame")
    _require(all(message.lengths), "a sequence without a token")
    padded = len(message.lengths) * max(message.lengths)
    _require(padded <= MAX_POSITIONS, f"a batch of {padded} positions; allowed are {MAX_POSITIONS}")


def _forward(message: pb.Forward) -> None:
    if not message.examples:
        _lengths(message)
        return
    _batch(message)
    _require(not message.HasField("hidden"), "hidden states beside the numbers of kept examples")
    counts = f"{len(message.examples)} examples for {len(message.lengths)} sequences"
    _require(len(message.examples) == len(message.lengths), counts)


def _keep(message: pb.Keep) -> None:
    rows = message.hidden.rows
    _require(0 < rows <= MAX_POSITIONS, f"an example of {rows} tokens; allowed are 1 to {MAX_POSITIONS}")


def _backward(message: pb.Backward) -> None:
    _require(message.reply or not message.ascent_pass, "a backward that is neither learned from nor answered")


def _weight(message: Any) -> None:
    _require(math.isfinite(message.weight) and message.weight >= 0, f"the weight {message.weight}")
    _require(message.round > 0, "round 0")


def _decode(message: pb.Decode) -> None:
    _lengths(message)
    _require(len(message.rows) <= MAX_SEQUENCES, f"{len(message.rows)} rows to keep")
    _require(message.step > 0 or not (message.forget or message.rows), "a new session with something to forget")
    _require(not message.rows or len(message.rows) == len(message.lengths), "rows and lengths that differ in number")


def _commit(message: pb.Commit) -> None:
    _weight(message)
    _require(message.step > 0, "optimizer step 0")


def _begin(message: pb.Begin) -> None:
    _require(message.round > 0, "round 0")
    _require(0 < len(message.participants) <= MAX_SEQUENCES, f"{len(message.participants)} participants")


def _hello(message: pb.Hello) -> None:
    _require(message.version == VERSION, f"protocol version {message.version}; this side uses {VERSION}")


def _ready(message: pb.Ready) -> None:
    if not message.HasField("keys"):
        return
    for part in (message.keys.sealing, message.keys.masking, message.keys.commitment):
        _require(len(part) == KEY_BYTES, f"a key of {len(part)} bytes")
    for part in (message.keys.certificate, message.keys.signature):
        _require(0 < len(part) <= MAX_CERTIFICATE, f"a certificate or signature of {len(part)} bytes")


def _update(message: pb.Update) -> None:
    _weight(message)
    masked = bool(message.masked)  # each access copies the whole field
    forms = [bool(message.tensors), masked, bool(message.compressed)]
    _require(sum(forms) <= 1, "an update in more than one form (tensors, masked, compressed)")
    _require(0 <= message.quality <= 1, f"the quality {message.quality}")
    _require(not (masked and message.quality), "a quality beside a masked update")
    _require(not (masked and message.weight), "a weight beside a masked update, which holds its own")
    _require(masked or not (message.learned or message.silos), "silos, or what one learned, beside no masked update")
    _require(not (message.learned and message.silos), "an update of one silo and of many")
    _require(message.silos <= MAX_SILOS, f"a sum of {message.silos} silos, {MAX_SILOS} are allowed")


def _secrets(message: Any) -> None:
    """The shares of ``Deal`` and ``Reveal`` are valid."""
    _require(message.round > 0, "round 0")
    parts = message.sealed if isinstance(message, pb.Deal) else message.shares
    _require(0 < len(parts) <= MAX_SEQUENCES, f"{len(parts)} shares")
    longest = max(map(len, parts.values()))
    _require(longest <= MAX_SHARE, f"a share of {longest} bytes")


_RULES: dict[str, Callable[[Any], None]] = {
    "hello": _hello,
    "begin": _begin,
    "forward": _forward,
    "backward": _backward,
    "keep": _keep,
    "commit": _commit,
    "decode": _decode,
    "update": _update,
    "ready": _ready,
    "deal": _secrets,
    "reveal": _secrets,
}
