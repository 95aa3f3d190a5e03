"""What a bad silo sends gets a named error, and changes nothing: neither for a good silo nor for its own next frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from google.protobuf.message import Message

from isthmus import errors
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.trunk.training import OPEN_STEPS
from isthmus.wire import codec, frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model

WIDTH = 32
CONTEXT = 64
GOOD_SESSION = 7
NAN, INFINITY = float("nan"), float("inf")
HUGE = 2**17 + 1
Outcome = tuple[list[Message], dict[str, torch.Tensor]]
Serve = Callable[[], TrunkService]


def matrix(rows: int = 5, width: int = WIDTH, *, seed: int = 0, spot: float = 0.5, cut: int = 0) -> pb.Matrix:
    """Random values, with ``spot`` at one place and ``cut`` bytes too few (negative: too many)."""
    h_TD = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    h_TD[rows // 2, width // 2] = spot
    whole = codec.encode(h_TD, "fp32")
    whole.data = whole.data[:-cut] if cut > 0 else whole.data + bytes(-cut)
    return whole


def other_codec() -> pb.Matrix:
    return codec.encode(torch.ones(5, WIDTH), "bf16")


def claimed(rows: int) -> pb.Matrix:
    """A matrix that says it has this many rows."""
    return pb.Matrix(codec="fp32", rows=rows, width=WIDTH, data=bytes(4 * WIDTH))


def forward(
    step: int = 1, lengths: Sequence[int] = (3, 2), hidden: pb.Matrix | None = None, train: bool = True
) -> pb.Forward:
    return pb.Forward(step=step, lengths=lengths, hidden=hidden or matrix(sum(lengths), seed=step), train=train)


def backward(step: int = 1, gradient: pb.Matrix | None = None) -> pb.Backward:
    return pb.Backward(step=step, gradient=gradient or matrix(seed=90), reply=True)


def decode(
    step: int = 0,
    lengths: Sequence[int] = (3, 2),
    hidden: pb.Matrix | None = None,
    *,
    session: int = 1,
    forget: int = 0,
    rows: Sequence[int] = (),
) -> pb.Decode:
    hidden = hidden or matrix(sum(lengths), seed=step)
    return pb.Decode(session=session, step=step, lengths=lengths, hidden=hidden, forget=forget, rows=rows)


def commit(step: int = 1, *, round: int = 1, weight: float = 2.0) -> pb.Commit:
    return pb.Commit(round=round, step=step, weight=weight)


def begin(*participants: str, round: int = 1) -> pb.Begin:
    return pb.Begin(round=round, participants=participants)


NEXT = decode(1, (1, 1))
JOIN = begin("good", "bad")
FILL = [forward(step) for step in range(1, OPEN_STEPS + 1)]
MATRICES = {
    "width": matrix(width=WIDTH + 1),
    "rows": matrix(4),
    "codec": other_codec(),
    "few-bytes": matrix(cut=4),
    "many-bytes": matrix(cut=-4),
    "odd-bytes": matrix(cut=1),
    "nan": matrix(spot=NAN),
    "infinity": matrix(spot=INFINITY),
    "minus-infinity": matrix(spot=-INFINITY),
    "nothing": pb.Matrix(),
}
Case = tuple[type[errors.IsthmusError], list[Message], Message, list[Message]]
CASES: dict[str, Case] = {
    "length-0": (errors.FrameError, [], forward(lengths=(5, 0)), [forward()]),
    "no-lengths": (errors.FrameError, [], pb.Forward(step=1, hidden=claimed(0), train=True), [forward()]),
    "huge-length": (errors.FrameError, [], forward(lengths=(HUGE,), hidden=claimed(HUGE)), [forward()]),
    "huge-rows": (errors.FrameError, [], forward(lengths=(HUGE - 1,), hidden=claimed(HUGE - 1)), [forward()]),
    "many-lengths": (errors.FrameError, [], forward(lengths=[1] * 4097), [forward()]),
    "context": (errors.FrameError, [], forward(lengths=(CONTEXT + 1,)), [forward(lengths=(CONTEXT,))]),
    "context-evaluating": (errors.FrameError, [], forward(lengths=(CONTEXT + 1,), train=False), [forward()]),
    "context-decoding": (errors.FrameError, [], decode(lengths=(CONTEXT + 1,)), [decode(lengths=(CONTEXT,))]),
    "context-outgrown": (errors.FrameError, [decode(lengths=(60,))], decode(1, (5,)), [decode(1, (4,))]),
    "context-after-forgetting": (
        errors.FrameError,
        [decode(lengths=(50, 60))],
        decode(1, (20, 7), forget=2, rows=(1, 0)),
        [decode(1, (6, 7), forget=2, rows=(1, 0))],
    ),
    "forward-out-of-order": (errors.OutOfOrderError, [forward(5)], forward(4), [backward(5)]),
    "forward-twice": (errors.OutOfOrderError, [forward(5)], forward(5), [backward(5)]),
    "forward-step-0": (errors.OutOfOrderError, [], forward(0), [forward(), backward()]),
    "too-many-open": (errors.ProtocolError, FILL, forward(65), [backward(64), backward(1), forward(65)]),
    "backward-unknown": (errors.UnknownStepError, [forward()], backward(2), [backward()]),
    "backward-evaluated": (errors.UnknownStepError, [forward(train=False)], backward(), [forward(), backward()]),
    "backward-twice": (errors.UnknownStepError, [forward(), backward()], backward(), [forward(2), backward(2)]),
    "backward-overflow": (errors.FrameError, [forward()], backward(gradient=matrix(spot=3e38)), [backward()]),
    "commit-before-begin": (errors.RoundLostError, [], commit(), []),
    "commit-other-round": (errors.RoundLostError, [JOIN], commit(round=2), []),
    "commit-skipping": (errors.OutOfOrderError, [JOIN], commit(2), []),
    "commit-step-0": (errors.FrameError, [JOIN], commit(0), []),
    "commit-round-0": (errors.FrameError, [JOIN], commit(round=0), []),
    "commit-weight-negative": (errors.FrameError, [JOIN], commit(weight=-1.0), []),
    "commit-weight-nan": (errors.FrameError, [JOIN], commit(weight=NAN), []),
    "begin-stranger": (errors.ProtocolError, [], begin("good"), []),
    "begin-round-0": (errors.FrameError, [], begin("bad", round=0), []),
    "begin-nobody": (errors.FrameError, [], begin(), []),
    "decode-unknown": (errors.UnknownSessionError, [], decode(1), [decode()]),
    "decode-closed": (errors.UnknownSessionError, [decode(), pb.Close(session=1)], NEXT, [decode()]),
    "decode-skipping": (errors.OutOfOrderError, [decode()], decode(2, (1, 1)), [NEXT]),
    "decode-twice": (errors.OutOfOrderError, [decode(), NEXT], NEXT, [decode(2, (1, 1))]),
    "decode-forgetting-all": (errors.FrameError, [decode()], decode(1, (1, 1), forget=3), [NEXT]),
    "decode-forgetting-more": (errors.FrameError, [decode()], decode(1, (1, 1), forget=2**32 - 1), [NEXT]),
    "decode-forgetting-padding": (
        errors.FrameError,
        [decode(), decode(1, (3, 1))],
        decode(2, (1, 1), forget=2),
        [decode(2, (1, 1), forget=1)],
    ),
    "decode-forgetting-new": (errors.FrameError, [], decode(forget=1), [decode()]),
    "decode-rows-beyond": (errors.FrameError, [decode()], decode(1, (1, 1), rows=(0, 2)), [NEXT]),
    "decode-rows-number": (errors.FrameError, [decode()], decode(1, (1, 1), rows=(0,)), [NEXT]),
    "decode-lengths-number": (errors.FrameError, [decode()], decode(1, (1, 1, 1)), [NEXT]),
    "decode-rows-new": (errors.FrameError, [], decode(rows=(0, 1)), [decode()]),
    "decode-foreign": (errors.UnknownSessionError, [], decode(1, session=GOOD_SESSION), []),
    "decode-foreign-closed": (
        errors.UnknownSessionError,
        [decode(session=GOOD_SESSION), pb.Close(session=GOOD_SESSION)],
        decode(1, session=GOOD_SESSION),
        [],
    ),
    "ready": (errors.ProtocolError, [], pb.Ready(), [pb.Ping()]),
    "answer-as-request": (errors.ProtocolError, [], pb.Welcome(), [pb.Ping()]),
}
for fault, wrong in MATRICES.items():
    CASES |= {
        f"forward-{fault}": (errors.FrameError, [], forward(hidden=wrong), [forward(), backward()]),
        f"backward-{fault}": (errors.FrameError, [forward()], backward(gradient=wrong), [backward()]),
        f"decode-{fault}": (errors.FrameError, [decode()], decode(1, (3, 2), wrong), [decode(1)]),
        f"open-{fault}": (errors.FrameError, [], decode(hidden=wrong), [decode()]),
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    model = save_tiny_model(
        "llama", tmp_path_factory.mktemp("model"), blocks=3, max_position_embeddings=CONTEXT, initializer_range=0.3
    )
    trunk = {"patience": 0.05}  # bad is named for a round that it joins late
    return make_recipe(model, silos=("good", "bad"), train={"steps": 1, "evaluate": False}, trunk=trunk)


@pytest.fixture(scope="module")
def serve(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts a trunk; all are stopped in the end."""
    services: list[TrunkService] = []

    def start() -> TrunkService:
        services.append(TrunkService(recipe, RunDirectory(tmp_path_factory.mktemp("run")).role("trunk")))
        return services[-1]

    yield start
    for service in services:
        service.stop()


@pytest.fixture(scope="module")
def hello(recipe: Recipe) -> pb.Hello:
    return greeting(Checkpoint(recipe.model.path), recipe)


@pytest.fixture(scope="module")
def undisturbed(serve: Serve, hello: pb.Hello) -> Outcome:
    return good_silo(serve(), hello, lambda: None)


def good_silo(service: TrunkService, hello: pb.Hello, meanwhile: Callable[[], None]) -> Outcome:
    """A training step and a session; something happens in the midst of both. Returns the answers and the adapter."""
    channel = LoopbackChannel(service, "good", greeting=hello)
    session = {"session": GOOD_SESSION}
    answers = [channel.call(request) for request in (decode(**session), JOIN, forward(), forward(2))]
    meanwhile()
    rest = (backward(), backward(2), decode(1, **session), commit(), decode(2, **session), forward(3, train=False))
    answers += [channel.call(request) for request in rest]
    return answers, adapters.adapter_of(service._runner.part)


def refused(channel: LoopbackChannel, error: type[errors.IsthmusError], request: Message) -> None:
    with pytest.raises(errors.IsthmusError) as caught:
        channel.call(request)
    assert type(caught.value) is error
    assert caught.value.message
    assert caught.value.remedy


def assert_equal(outcome: Outcome, expected: Outcome) -> None:
    assert outcome[0] == expected[0]
    assert all(torch.equal(outcome[1][name], tensor) for name, tensor in expected[1].items())


@pytest.mark.parametrize("case", CASES)
def test_refused_without_a_trace(case: str, serve: Serve, hello: pb.Hello, undisturbed: Outcome) -> None:
    error, before, wrong, after = CASES[case]
    service = serve()
    answers: list[Message] = []

    def disturb() -> None:
        channel = LoopbackChannel(service, "bad", greeting=hello)
        for request in before:
            channel.call(request)
        refused(channel, error, wrong)
        answers.extend(channel.call(request) for request in after)

    assert_equal(good_silo(service, hello, disturb), undisturbed)
    assert answers == answers_without(wrong, serve(), hello, case)


def answers_without(wrong: Message, service: TrunkService, hello: pb.Hello, case: str) -> list[Message]:
    """What the frames after the wrong one are answered by a trunk that never got it."""
    _, before, _, after = CASES[case]
    if not after:
        return []
    channel = LoopbackChannel(service, "bad", greeting=hello)
    return [channel.call(request) for request in (*before, *after)][len(before) :]


@pytest.mark.parametrize("request_", [forward(), backward(), decode(), commit(), begin("bad"), pb.Close()], ids=str)
def test_before_hello(request_: Message, serve: Serve, hello: pb.Hello, undisturbed: Outcome) -> None:
    service = serve()
    channel = LoopbackChannel(service, "bad")
    assert_equal(
        good_silo(service, hello, lambda: refused(channel, errors.ProtocolError, request_)),
        undisturbed,
    )
    assert channel.call(pb.Ping()) == pb.Pong()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"fingerprint": "other"}, errors.MismatchError),
        ({"bottom": 2}, errors.MismatchError),
        ({"top": 0}, errors.MismatchError),
        ({"version": frames.VERSION + 1}, errors.FrameError),
        ({"version": 0}, errors.FrameError),
    ],
)
def test_hello(
    change: dict[str, object], error: type[errors.IsthmusError], serve: Serve, hello: pb.Hello, undisturbed: Outcome
) -> None:
    service = serve()
    wrong = pb.Hello()
    wrong.CopyFrom(hello)
    for name, value in change.items():
        setattr(wrong, name, value)
    channel = LoopbackChannel(service, "bad")

    def disturb() -> None:
        refused(channel, error, wrong)
        refused(channel, errors.ProtocolError, forward())

    assert_equal(good_silo(service, hello, disturb), undisturbed)
    assert isinstance(channel.call(hello), pb.Welcome)
    channel.call(forward())
