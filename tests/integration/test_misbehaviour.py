"""A misbehaving silo beside a good one, over gRPC: it gets the named error, and the good one's work is as if alone.

The good silo is a real one: it generates, trains a step, and looks at what the trunk has learned. The other one speaks
in frames, over and over while the good silo works. Nothing here looks into the trunk.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from google.protobuf.message import Message
from transformers import LogitsProcessor, LogitsProcessorList

from isthmus import errors
from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import at_address
from isthmus.engines.roles import start_server
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, connect, greeting, join
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Channel
from tests.conftest import make_recipe, save_tiny_model
from tests.oracle.twins import Tensors, assert_same, prompts, ragged

WIDTH, CONTEXT = 32, 128
PATIENCE = 1.0
HANG = 60.0
"""Seconds after which something is taken to hang."""
LENGTH = 40
GOOD_SESSIONS = range(1, 5)
"""Numbers that the good silo's sessions may have."""
EXACT = 1e-5
"""Relative: a trunk may compute two silos' rows in one batch."""
Misdeed = Callable[[Channel], None]


@dataclass
class Work:
    """What the good silo got out of the trunk."""

    tokens: torch.Tensor
    gradients: Tensors
    """Of its own adapters, bottom's through the trunk's backward."""
    learned: torch.Tensor
    """Logits after the optimizer step."""
    contributors: int


class Wrongdoer:
    """Does its misdeed again and again in a thread of its own, until the block ends, which raises what went wrong."""

    def __init__(self, channel: Channel, misdeed: Misdeed) -> None:
        self._channel = channel
        self._misdeed = misdeed
        self._turned = threading.Condition()
        self._turns = 0
        self._over = False
        self._failure: BaseException | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over = True
            thread.join(HANG)
        if self._failure is not None:
            raise self._failure
        assert not thread.is_alive()

    def turn(self) -> None:
        """Wait until it has done it once more from beginning to end."""
        with self._turned:
            due = self._turns + 2
            assert self._turned.wait_for(lambda: self._turns >= due or self._failure, HANG), "no answer"

    def _work(self) -> None:
        try:
            while not self._over:
                self._misdeed(self._channel)
                self._note()
        except BaseException as error:
            self._failure = error
            self._note()

    def _note(self) -> None:
        with self._turned:
            self._turns += 1
            self._turned.notify_all()


class Midway(LogitsProcessor):
    """Calls back once, in the middle of an answer."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._left = LENGTH // 2

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            self._call()
        return scores


Connect = Callable[[], tuple[Silo, Channel]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("federation")
    model = save_tiny_model("llama", folder / "model", max_position_embeddings=CONTEXT, initializer_range=0.3)
    made = make_recipe(
        model,
        silos=("good", "bad"),
        train={"steps": 1, "optimizer": "sgd", "learning_rate": 0.1},
        trunk={"patience": PATIENCE},
        wire={"certificates": str(folder / "certificates")},
    )
    make_certificates(made, folder / "certificates")
    return made


@pytest.fixture
def fresh(recipe: Recipe, tmp_path: Path) -> Iterator[Connect]:
    """Starts a trunk of its own at each call, with a good silo and the bad one's channel; all end with the test."""
    ends: list[Callable[[], object]] = []

    def start() -> tuple[Silo, Channel]:
        run = RunDirectory.create(tmp_path / f"run{len(ends)}", recipe)
        server, services = start_server(at_address(recipe, "localhost:0"), run, ("trunk",))
        trunk = services["Trunk"]
        assert isinstance(trunk, TrunkService)
        there = at_address(recipe, f"localhost:{server.port}")
        hello = greeting(Checkpoint(recipe.model.path), recipe)
        good, bad = join(there, "good"), connect(there, "bad", "Trunk", there.trunk.address, hello)
        ends.extend((good.close, bad.close, server.stop, trunk.stop))
        return good, bad

    yield start
    for end in ends:
        end()


def nothing() -> None: ...


def work(
    silo: Silo,
    participants: tuple[str, ...] = ("good",),
    *,
    in_session: Callable[[], None] = nothing,
    in_step: Callable[[], None] = nothing,
) -> Work:
    """An answer and a training step; what is to happen in the midst of them is called there."""
    tokens = silo.model.generate(
        **prompts((3, 20, 11)),
        min_new_tokens=LENGTH,
        max_new_tokens=LENGTH,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([Midway(in_session)]),
    )
    silo.rounds.begin(1, list(participants))
    batch = ragged("left", 1)
    loss = silo.model(**batch, use_cache=False).loss
    in_step()
    loss.backward()
    in_step()
    gradients = {name: one.grad for part in silo.parts for name, one in adapters.trainable(part).items()}
    contributors = silo.rounds.commit(1, 1, 60.0)
    with torch.no_grad():
        learned = silo.model(**batch, use_cache=False).logits
    return Work(tokens, gradients, learned, contributors)


@pytest.fixture
def alone(fresh: Connect) -> Work:
    """The good silo's work where nobody else is."""
    silo, _ = fresh()
    before = silo.model(**ragged("left", 1), use_cache=False).logits.detach()
    found = work(silo)
    assert not torch.allclose(found.learned, before), "the step changed nothing: a lost one would not show"
    return found


def assert_as_if_alone(found: Work, alone: Work) -> None:
    assert torch.equal(found.tokens, alone.tokens)
    assert_same(found.gradients, alone.gradients, EXACT)
    assert_same({"logits": found.learned}, {"logits": alone.learned}, EXACT)
    assert found.contributors == 1


def refused(channel: Channel, error: type[errors.IsthmusError], request: Message) -> None:
    """The request gets exactly this error, with a remedy."""
    with pytest.raises(errors.IsthmusError) as caught:
        channel.submit(request).result(HANG)
    assert type(caught.value) is error
    assert caught.value.message
    assert caught.value.remedy


def matrix(rows: int, name: str = "fp32") -> pb.Matrix:
    return codec.encode(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)), name)


def decode(session: int, step: int, rows: int, *, forget: int = 0, hidden: pb.Matrix | None = None) -> pb.Decode:
    """A frame of one sequence with so many new tokens."""
    return pb.Decode(session=session, step=step, lengths=[rows], hidden=hidden or matrix(rows), forget=forget)


def forward(step: int, rows: int, *, train: bool = False, hidden: pb.Matrix | None = None) -> pb.Forward:
    return pb.Forward(step=step, lengths=[rows], hidden=hidden or matrix(rows), train=train)


def forge_a_session(channel: Channel) -> None:
    for number in (0, 12345, 2**64 - 1):
        refused(channel, errors.UnknownSessionError, decode(number, 1, 1))


def take_a_session(channel: Channel) -> None:
    """Continue, rewind and close what the other silo has open, by its number; one of its own of that number is fine."""
    for number in GOOD_SESSIONS:
        for step in (1, 5, 20):
            refused(channel, errors.UnknownSessionError, decode(number, step, 1, forget=2))
        channel.call(pb.Close(session=number))
        assert channel.call(decode(number, 0, 4)).hidden.rows == 4
        channel.call(pb.Close(session=number))
        refused(channel, errors.UnknownSessionError, decode(number, 1, 1))


def roll_back_too_far(channel: Channel) -> None:
    """Beyond the first token, in a session of its own, which goes on as if nothing had been asked."""
    channel.call(decode(9, 0, 5))
    for positions in (5, 6, 2**32 - 1):
        refused(channel, errors.FrameError, decode(9, 1, 1, forget=positions))
    refused(channel, errors.FrameError, decode(8, 0, 5, forget=1))
    assert channel.call(decode(9, 1, 1, forget=4)).hidden.rows == 1


def speak_another_codec(channel: Channel) -> None:
    """One that the recipe does not name, one that nobody has, and the right name on another's bytes."""
    foreign, unknown, disguised = matrix(5, "int8"), matrix(5), matrix(5, "bf16")
    unknown.codec, disguised.codec = "gzip9", "fp32"
    for hidden in (foreign, unknown, disguised):
        refused(channel, errors.FrameError, decode(9, 0, 5, hidden=hidden))
        refused(channel, errors.FrameError, forward(1, 5, hidden=hidden))


def outgrow_the_context(channel: Channel) -> None:
    """As one prompt, as rows to evaluate, and token by token."""
    refused(channel, errors.FrameError, decode(9, 0, CONTEXT + 1))
    refused(channel, errors.FrameError, forward(1, CONTEXT + 1))
    channel.call(decode(9, 0, CONTEXT - 1))
    channel.call(decode(9, 1, 1))
    refused(channel, errors.FrameError, decode(9, 2, 1))


MISDEEDS = (forge_a_session, take_a_session, roll_back_too_far, speak_another_codec, outgrow_the_context)


@pytest.mark.parametrize("misdeed", MISDEEDS, ids=lambda misdeed: misdeed.__name__)
def test_a_refused_frame_disturbs_nobody(misdeed: Misdeed, fresh: Connect, alone: Work) -> None:
    silo, bad = fresh()
    wrongdoer = Wrongdoer(bad, misdeed)
    with wrongdoer.at_work():
        found = work(silo, in_session=wrongdoer.turn, in_step=wrongdoer.turn)
    assert_as_if_alone(found, alone)


def test_a_step_that_is_never_committed(fresh: Connect, alone: Work) -> None:
    """The others wait as long as patience says and go on; what the silo left open is gone with the round."""
    silo, bad = fresh()
    begun = bad.submit(pb.Begin(round=1, participants=["good", "bad"]))
    steps = itertools.count(1)

    def leave_open() -> None:
        begun.result(HANG)
        bad.call(forward(next(steps), 7, train=True))

    assert_as_if_alone(work(silo, ("good", "bad"), in_step=leave_open), alone)
    silo.rounds.begin(2, ["good"])
    refused(bad, errors.UnknownStepError, pb.Backward(step=1, gradient=matrix(7), reply=True))
    refused(bad, errors.RoundLostError, pb.Commit(round=1, step=1, weight=60.0))
