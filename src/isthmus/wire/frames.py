"""Frames: their construction, parsing and checks. Every received frame is checked before anything acts on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from isthmus.errors import FrameError, IsthmusError, ProtocolError, by_code
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.parts import check_parts

VERSION = 5
"""Version of the protocol."""
MAX_SEQUENCES = 4096
MAX_SILOS = 2**20
"""Silos in one sum."""
MAX_POSITIONS = 2**17
"""Largest padded size of a frame's batch: number of sequences times the longest length."""
KEY_BYTES = 32
MAX_KEYS = 2**15
"""Keys of a recipe in one greeting: some for each silo."""
MAX_KEY = 1024
"""Largest key with its value, in characters."""
MAX_NAME = 64
"""Longest name of a run or a process, in characters."""
MAX_CERTIFICATE = 8192
"""Largest certificate or signature in bytes."""
MAX_FILES = 1024
"""Most files of a model's parts."""
OPTIMIZERS = ("sgd", "adam", "adamw")
"""Kinds of optimizers that a trunk can follow."""
MAX_SHARE = 256
"""Largest encrypted share in bytes."""
ANSWERS: dict[type[Message], tuple[type[Message], ...]] = {
    pb.Hello: (pb.Welcome,),
    pb.Ping: (pb.Pong,),
    pb.Begin: (pb.Begun,),
    pb.Forward: (pb.Hidden,),
    pb.Backward: (pb.Gradient,),
    pb.Commit: (pb.Stepped,),
    pb.Keep: (pb.Kept,),
    pb.End: (pb.Ended,),
    pb.Move: (pb.Moved,),
    pb.Decode: (pb.Hidden,),
    pb.Close: (pb.Closed,),
    pb.Ready: (pb.Plan,),
    pb.Update: (pb.Accepted, pb.Survivors),
    pb.Deal: (pb.Dealt,),
    pb.Agree: (pb.Agreed,),
    pb.Reveal: (pb.Accepted,),
    pb.Current: (pb.Adapters,),
    pb.Enroll: (pb.Enrolled,),
    pb.Withdrawals: (pb.Withdrawn,),
    pb.Listing: (pb.Listed,),
    pb.Fetch: (pb.Fetched,),
}
"""By kind of request, the answers that it may get; beside them, a ``Failure``."""
WAITING = (pb.Begin, pb.Commit, pb.End, pb.Move, pb.Ready, pb.Deal, pb.Agree, pb.Reveal)
"""Kinds of requests whose answers wait for other parties, as do those to masked updates: for hours, if these do."""
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
        FrameError: the bytes are not a frame, or one of too many parts.
    """
    check_parts(data)
    try:
        return pb.Frame.FromString(data)
    except (DecodeError, UnicodeDecodeError) as error:
        raise FrameError(f"received {len(data)} bytes that are not a frame", remedy=_REMEDY) from error


def checked(frame: pb.Frame) -> Message:
    """The body of a received frame.

    Raises:
        FrameError: there is none, or it fails a check that does not depend on the model.
    """
    kind = frame.WhichOneof("body")
    if kind is None:
        raise FrameError("received a frame without a body", remedy=_REMEDY)
    body: Message = getattr(frame, kind)
    if rule := _RULES.get(kind):
        rule(body)
    return body


def waits_for_others(request: Message) -> bool:
    """Whether the answer to this request may wait for what other parties do. Any other is due once it is computed."""
    return isinstance(request, WAITING) or (isinstance(request, pb.Update) and bool(request.masked))


def check_answer(request: type[Message], body: Message) -> None:
    """Check that a request of this kind may be answered with this body.

    Raises:
        ProtocolError: it may not.
    """
    allowed = ANSWERS.get(request)
    if allowed is not None and not isinstance(body, allowed):
        raise ProtocolError(
            f"{request.__name__} was answered with {type(body).__name__}; "
            f"expected {' or '.join(kind.__name__ for kind in allowed)}",
            remedy=_REMEDY,
        )


def failure(error: IsthmusError) -> pb.Failure:
    """The body that reports an error to the peer."""
    return pb.Failure(code=error.code, message=error.message, remedy=error.remedy)


def reported_error(received: pb.Failure) -> IsthmusError:
    """The error that a peer reported with ``failure``."""
    return by_code(received.code)(received.message, remedy=received.remedy)


def _invalid(problem: str) -> FrameError:
    return FrameError(f"received {problem}", remedy=_REMEDY)


def _lengths(message: Any) -> None:
    """The batch is valid and has one hidden state for each token."""
    _batch(message)
    rows = sum(message.lengths)
    if message.hidden.rows != rows:
        raise _invalid(f"{message.hidden.rows} rows for sequences of {rows} tokens")


def _batch(message: Any) -> None:
    if not 0 < len(message.lengths) <= MAX_SEQUENCES:
        raise _invalid(f"{len(message.lengths)} sequences in one frame")
    if not all(message.lengths):
        raise _invalid("a sequence without a token")
    padded = len(message.lengths) * max(message.lengths)
    if padded > MAX_POSITIONS:
        raise _invalid(f"a batch of {padded} positions; allowed are {MAX_POSITIONS}")


def _forward(message: pb.Forward) -> None:
    if not message.examples:
        _lengths(message)
        if message.answered:
            raise _invalid("digests of answers without the numbers of examples")
        return
    _batch(message)
    if message.HasField("hidden"):
        raise _invalid("hidden states beside the numbers of kept examples")
    if len(message.examples) != len(message.lengths):
        raise _invalid(f"{len(message.examples)} examples for {len(message.lengths)} sequences")
    if len(message.answered) not in (0, len(message.examples)):
        raise _invalid(f"{len(message.answered)} digests of answers for {len(message.examples)} examples")


def _hidden(message: pb.Hidden) -> None:
    changed = list(message.changed)
    if len(changed) > MAX_SEQUENCES or changed != sorted(set(changed)):
        raise _invalid("changed sequences that are too many or in no order")
    if bool(changed) != message.HasField("changes"):
        raise _invalid("changed sequences without changes, or changes of none")


def _keep(message: pb.Keep) -> None:
    rows = message.hidden.rows
    if not 0 < rows <= MAX_POSITIONS:
        raise _invalid(f"an example of {rows} tokens; allowed are 1 to {MAX_POSITIONS}")


def _backward(message: pb.Backward) -> None:
    if message.ascent_pass and not message.reply:
        raise _invalid("a backward that is neither learned from nor answered")
    _factor(message.keep)


def _gradient(message: pb.Gradient) -> None:
    """A silo's own clipping follows the norm: one that is no number would spoil all that it trains."""
    if not 0 <= message.norm < math.inf:
        raise _invalid(f"gradients of the norm {message.norm}")


def _factor(factor: float) -> None:
    """Clipping and averaging make gradients smaller: one beyond 1 would make a silo's count for more than others'."""
    if not 0 <= factor <= 1:
        raise _invalid(f"the factor {factor} of gradients; it may be 0 to 1")


def _weight(message: Any) -> None:
    if not math.isfinite(message.weight) or message.weight < 0:
        raise _invalid(f"the weight {message.weight}")
    if message.round <= 0:
        raise _invalid("round 0")


def _decode(message: pb.Decode) -> None:
    _lengths(message)
    if len(message.rows) > MAX_SEQUENCES:
        raise _invalid(f"{len(message.rows)} rows to keep")
    if message.step == 0 and (message.forget or message.rows or message.drafted):
        raise _invalid("a new session with something to forget, or with drafts")
    if message.rows and len(message.rows) != len(message.lengths):
        raise _invalid("rows and lengths that differ in number")


def _commit(message: pb.Commit) -> None:
    _weight(message)
    if message.step <= 0:
        raise _invalid("optimizer step 0")
    _factor(message.scale)
    if message.HasField("optimizer"):
        _optimizer(message.optimizer)


def _optimizer(message: pb.Optimizer) -> None:
    if message.kind not in OPTIMIZERS:
        raise _invalid(f"an optimizer of the kind {message.kind!r}; known are {', '.join(OPTIMIZERS)}")
    for name in ("learning_rate", "weight_decay", "epsilon", "momentum", "dampening"):
        if not 0 <= getattr(message, name) < math.inf:
            raise _invalid(f"an optimizer whose {name} is {getattr(message, name)}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(message, name) < 1:
            raise _invalid(f"an optimizer whose {name} is {getattr(message, name)}")
    if message.nesterov and (not message.momentum or message.dampening):
        raise _invalid("an optimizer with Nesterov momentum, but no momentum or with dampening")


def _begin(message: pb.Begin) -> None:
    if message.open == bool(message.round):
        raise _invalid("an open round with a number" if message.open else "round 0")
    if not message.open and (message.HasField("start") or message.digest):
        raise _invalid("a round with a fixed number of steps and a start of its own")
    least = 0 if message.open else 1
    if not least <= len(message.participants) <= MAX_SEQUENCES:
        raise _invalid(f"{len(message.participants)} participants")
    if len(message.digest) not in (0, KEY_BYTES):
        raise _invalid(f"a digest of {len(message.digest)} bytes")
    for part in (message.published.certificate, message.published.signature):
        if len(part) > MAX_CERTIFICATE:
            raise _invalid(f"a certificate or signature of {len(part)} bytes")


def _end(message: pb.End) -> None:
    if message.round <= 0:
        raise _invalid("round 0")


def _hello(message: pb.Hello) -> None:
    if message.version != VERSION:
        raise _invalid(f"protocol version {message.version}; this side uses {VERSION}")
    if len(message.keys) > MAX_KEYS or any(len(key) + len(value) > MAX_KEY for key, value in message.keys.items()):
        raise _invalid(f"more than {MAX_KEYS} keys, or one of more than {MAX_KEY} characters")
    if len(message.instance) > MAX_NAME:
        raise _invalid(f"the name of a process with {len(message.instance)} characters")


def _ping(message: pb.Ping) -> None:
    if message.HasField("compared"):
        _hello(message.compared)


def _pong(message: pb.Pong) -> None:
    if not 0 <= message.time < math.inf:
        raise _invalid(f"the time {message.time}")
    _run(message.welcome)


def _run(message: Any) -> None:
    if len(message.run) > MAX_NAME:
        raise _invalid(f"the name of a run with {len(message.run)} characters")


def _ready(message: pb.Ready) -> None:
    _run(message)
    if not message.HasField("keys"):
        return
    for part in (message.keys.sealing, message.keys.masking, message.keys.commitment):
        if len(part) != KEY_BYTES:
            raise _invalid(f"a key of {len(part)} bytes")
    for part in (message.keys.certificate, message.keys.signature):
        if not 0 < len(part) <= MAX_CERTIFICATE:
            raise _invalid(f"a certificate or signature of {len(part)} bytes")


def _update(message: pb.Update) -> None:
    _weight(message)
    masked = bool(message.masked)  # each access copies the whole field
    forms = [bool(message.tensors), masked, bool(message.compressed)]
    if sum(forms) > 1:
        raise _invalid("an update in more than one form (tensors, masked, compressed)")
    if not 0 <= message.quality <= 1:
        raise _invalid(f"the quality {message.quality}")
    if masked and message.quality:
        raise _invalid("a quality beside a masked update")
    if masked and message.weight:
        raise _invalid("a weight beside a masked update, which holds its own")
    if not masked and (message.learned or message.silos):
        raise _invalid("silos, or what one learned, beside no masked update")
    if message.learned and message.silos:
        raise _invalid("an update of one silo and of many")
    if message.silos > MAX_SILOS:
        raise _invalid(f"a sum of {message.silos} silos, {MAX_SILOS} are allowed")


def _secrets(message: Any) -> None:
    """The shares of ``Deal`` and ``Reveal`` are valid."""
    if message.round <= 0:
        raise _invalid("round 0")
    parts = message.sealed if isinstance(message, pb.Deal) else message.shares
    if not 0 < len(parts) <= MAX_SEQUENCES:
        raise _invalid(f"{len(parts)} shares")
    longest = max(map(len, parts.values()))
    if longest > MAX_SHARE:
        raise _invalid(f"a share of {longest} bytes")
    if isinstance(message, pb.Deal) and any(len(one) != 2 * KEY_BYTES for one in message.commitments.values()):
        raise _invalid(f"a commitment of other than {2 * KEY_BYTES} bytes")


def _agree(message: pb.Agree) -> None:
    if message.round <= 0:
        raise _invalid("round 0")
    if not 0 < len(message.signature) <= MAX_CERTIFICATE:
        raise _invalid(f"a signature of {len(message.signature)} bytes")


def _enroll(message: pb.Enroll) -> None:
    if len(message.request) > MAX_CERTIFICATE:
        raise _invalid(f"a signing request of {len(message.request)} bytes")


def _listed(message: pb.Listed) -> None:
    if len(message.files) > MAX_FILES:
        raise _invalid(f"a list of {len(message.files)} files")
    for file in message.files:
        _path(file.name)


def _fetch(message: pb.Fetch) -> None:
    _path(message.name)


def _path(name: str) -> None:
    """A file's place below a folder, nowhere else."""
    parts = name.split("/")
    if len(name) > MAX_KEY or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise _invalid(f"the name {name[:MAX_NAME]!r} of a file")


_RULES: dict[str, Callable[[Any], None]] = {
    "hello": _hello,
    "welcome": _run,
    "ping": _ping,
    "pong": _pong,
    "begin": _begin,
    "forward": _forward,
    "hidden": _hidden,
    "backward": _backward,
    "gradient": _gradient,
    "keep": _keep,
    "commit": _commit,
    "end": _end,
    "decode": _decode,
    "update": _update,
    "ready": _ready,
    "adapters": _run,
    "deal": _secrets,
    "reveal": _secrets,
    "agree": _agree,
    "enroll": _enroll,
    "listed": _listed,
    "fetch": _fetch,
}
