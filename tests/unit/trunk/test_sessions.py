"""Sessions on the trunk: how they end, and that a silo whose session is gone generates on as if it were not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StoppingCriteria, StoppingCriteriaList

from isthmus.errors import UnknownSessionError, UnknownStepError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.split import SplitForCausalLM
from isthmus.privacy.events import Release
from isthmus.recipe import CodecSection, Recipe, TrunkSection
from isthmus.silo.join import greeting
from isthmus.silo.remote import RemoteTrunk
from isthmus.storage.record import RunDirectory
from isthmus.trunk.codecs import Codecs
from isthmus.trunk.decoding import Decoding, SessionStep
from isthmus.trunk.scheduler import Job
from isthmus.trunk.service import TrunkService
from isthmus.trunk.sessions import EVICTION_GRACE, LONG, Sessions
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import Split, make_recipe, save_tiny_model
from tests.oracle.twins import distance, prompts

WIDTH = 32
LENGTH = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture
def recipe(model: Path) -> Recipe:
    return make_recipe(model, silos=("a", "b"))


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrunkService]:
    started = TrunkService(
        make_recipe(model, silos=("a", "b")), RunDirectory(tmp_path_factory.mktemp("run")).role("trunk")
    )
    yield started
    started.stop()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def hidden(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def decode(sessions: Sessions, peer: str, session: int, step: int, lengths: tuple[int, ...] = (2,), **how: Any) -> Any:
    """One step by itself, as the scheduler has it computed."""
    h_TD = how.pop("h_TD", None)
    sent = codec.encode(hidden(sum(lengths), seed=step) if h_TD is None else h_TD, "fp32")
    kept: Any = None  # nothing is named by number here
    decoding = Decoding(sessions._runner, sessions, Codecs(CodecSection(), WIDTH, WIDTH, kept), chunk=512)
    request = pb.Decode(session=session, step=step, lengths=lengths, hidden=sent, **how)
    job = Job(decoding, (peer, session), SessionStep(peer, request))
    if decoding.gather([job], 0.0)[0]:
        decoding.run([job])
    return codec.decode(job.done.result(0).hidden, rows=sum(lengths), width=WIDTH, codec="fp32")


def made(service: TrunkService, clock: Clock, **section: Any) -> Sessions:
    return Sessions(service._runner, TrunkSection(**section), 2, clock)


def test_lease_ends(service: TrunkService) -> None:
    clock = Clock()
    sessions = made(service, clock, lease=10.0)
    decode(sessions, "a", 1, 0)
    clock.now = 6.0
    decode(sessions, "a", 2, 0)
    clock.now = 10.0
    decode(sessions, "a", 1, 1)  # just in time, and its lease begins again
    clock.now = 20.0
    decode(sessions, "a", 1, 2)
    assert len(sessions) == 1
    with pytest.raises(UnknownSessionError):
        decode(sessions, "a", 2, 1)
    clock.now = 30.1
    with pytest.raises(UnknownSessionError):
        decode(sessions, "a", 1, 3)
    assert len(sessions) == 0


def test_longest_unused_of_the_silo_itself_makes_room(service: TrunkService) -> None:
    """The other silo has no more than its share."""
    clock = Clock()
    sessions = made(service, clock, sessions=3)
    decode(sessions, "a", 1, 0)
    decode(sessions, "b", 1, 0)
    decode(sessions, "a", 2, 0)
    decode(sessions, "a", 1, 1)
    clock.now = EVICTION_GRACE
    decode(sessions, "a", 3, 0)
    with pytest.raises(UnknownSessionError):
        decode(sessions, "a", 2, 1)
    decode(sessions, "b", 1, 1)
    decode(sessions, "a", 1, 2)
    assert len(sessions) == 3


def test_a_silo_within_its_share_takes_from_one_that_exceeds_it(service: TrunkService) -> None:
    """Though the other uses them all the time, or begins anew; the session that it used last stays."""
    clock = Clock()
    sessions = made(service, clock, sessions=4)
    for number in range(4):
        decode(sessions, "a", number, 0)
    clock.now = EVICTION_GRACE / 2
    for number in range(4):
        decode(sessions, "a", number, 0)
    with pytest.raises(NoAnswer):  # each has a moment to get somewhere
        decode(sessions, "b", 0, 0)
    clock.now = EVICTION_GRACE
    for number in range(4):
        decode(sessions, "a", number, 1)
    for number in range(2):
        decode(sessions, "b", number, 0)
    assert set(sessions._sessions) == {("a", 2), ("a", 3), ("b", 0), ("b", 1)}
    with pytest.raises(NoAnswer):  # no answer: it waits
        decode(sessions, "b", 2, 0)
    with pytest.raises(UnknownSessionError):
        decode(sessions, "a", 0, 2)


def test_bytes_are_shared_as_sessions_are(service: TrunkService) -> None:
    limit = 2 * service._runner.new_cache().bytes_for(2)
    clock = Clock()
    sessions = made(service, clock, session_bytes=limit)
    decode(sessions, "a", 1, 0)
    decode(sessions, "a", 2, 0)
    clock.now = EVICTION_GRACE
    decode(sessions, "a", 1, 1)
    decode(sessions, "a", 2, 1)
    decode(sessions, "b", 1, 0)
    assert set(sessions._sessions) == {("a", 2), ("b", 1)}
    assert sessions.nbytes <= limit


def test_one_session_that_is_more_than_a_share_gives_way_later(service: TrunkService) -> None:
    """It would have to begin again, and again."""
    clock = Clock()
    sessions = made(service, clock, session_bytes=2 * service._runner.new_cache().bytes_for(2))
    decode(sessions, "a", 1, 0, (2, 2))
    clock.now = LONG * EVICTION_GRACE - 0.1
    decode(sessions, "a", 1, 1, (1, 1))
    with pytest.raises(NoAnswer):
        decode(sessions, "b", 1, 0)
    clock.now = LONG * EVICTION_GRACE
    decode(sessions, "a", 1, 2, (1, 1))
    decode(sessions, "b", 1, 0)
    assert set(sessions._sessions) == {("b", 1)}


def test_what_lay_idle_for_long_makes_room_for_anyone(service: TrunkService) -> None:
    clock = Clock()
    sessions = made(service, clock, sessions=2)
    decode(sessions, "a", 1, 0)
    decode(sessions, "b", 1, 0)
    clock.now = LONG * EVICTION_GRACE
    decode(sessions, "b", 1, 1)
    decode(sessions, "b", 2, 0)
    assert set(sessions._sessions) == {("b", 1), ("b", 2)}


def test_expiry_says_when_the_next_lease_ends(service: TrunkService) -> None:
    clock = Clock()
    sessions = made(service, clock, lease=10.0)
    assert sessions.expire() is None
    decode(sessions, "a", 1, 0)
    clock.now = 4.0
    assert sessions.expire() == pytest.approx(6.0, abs=0.01)
    clock.now = 10.5
    assert sessions.expire() is None
    assert len(sessions) == 0


def test_step_0_begins_anew_without_evicting(service: TrunkService) -> None:
    sessions = made(service, Clock(), sessions=2)
    first = decode(sessions, "a", 1, 0)
    decode(sessions, "b", 1, 0)
    decode(sessions, "a", 1, 1)
    assert torch.equal(decode(sessions, "a", 1, 0), first)
    decode(sessions, "b", 1, 1)


def test_close_frees(service: TrunkService) -> None:
    sessions = made(service, Clock())
    decode(sessions, "a", 1, 0)
    decode(sessions, "b", 1, 0)
    sessions.close("a", 1)
    sessions.close("a", 1)
    assert list(sessions._sessions) == [("b", 1)]


@settings(max_examples=25, deadline=None)
@given(frames=st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=2, max_size=4))
def test_ragged_rows(service: TrunkService, frames: list[tuple[int, ...]]) -> None:
    """Rows of unequal frames give what each row gives by itself, from its first token on."""
    sessions = made(service, Clock())
    sent = [hidden(sum(lengths), seed=step) for step, lengths in enumerate(frames)]
    got = [decode(sessions, "a", 1, step, lengths, h_TD=sent[step]) for step, lengths in enumerate(frames)]
    for row in range(3):
        own = [list(torch.split(h_TD, lengths))[row] for h_TD, lengths in zip(sent, frames, strict=True)]
        answer = [list(torch.split(h_TD, lengths))[row] for h_TD, lengths in zip(got, frames, strict=True)]
        whole = torch.cat(own)
        with torch.no_grad():
            expected = service._runner.full_pass(whole, [len(whole)])
        assert distance(torch.cat(answer), expected) < 1e-5


@settings(max_examples=25, deadline=None)
@given(drafted=st.integers(1, 6), kept=st.integers(0, 6), rows=st.permutations([0, 1]))
def test_crop_and_choose_rows(service: TrunkService, drafted: int, kept: int, rows: list[int]) -> None:
    """A session that forgets guesses and swaps rows goes on as one that never had them."""
    kept = min(kept, drafted - 1)
    start, guess, rest = hidden(8), hidden(2 * drafted, seed=1).view(2, drafted, WIDTH), hidden(2, seed=2)
    cropped, straight = made(service, Clock()), made(service, Clock())
    decode(cropped, "a", 1, 0, (4, 4), h_TD=start)
    decode(cropped, "a", 1, 1, (drafted, drafted), h_TD=guess.reshape(-1, WIDTH))
    got = decode(cropped, "a", 1, 2, (1, 1), h_TD=rest, forget=drafted - kept, rows=rows)
    whole = torch.cat([start.view(2, 4, WIDTH), guess[:, :kept]], dim=1)[rows]
    decode(straight, "a", 1, 0, (4 + kept, 4 + kept), h_TD=whole.reshape(-1, WIDTH))
    assert distance(got, decode(straight, "a", 1, 1, (1, 1), h_TD=rest)) < 1e-5


class Evicting(StoppingCriteria):
    """Never stops; takes the silo's sessions away after each of these numbers of tokens."""

    def __init__(self, service: TrunkService, after: set[int]) -> None:
        self._service = service
        self._after = after
        self._calls = 0
        self.evicted = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._calls += 1
        if self._calls in self._after:
            self.evicted += len(self._service._sessions)
            self._service._sessions.close_all("a")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def releases(split: SplitForCausalLM) -> list[Release]:
    assert isinstance(split.trunk, RemoteTrunk)
    noted: list[Release] = split.boundary.ledger.releases
    return [replace(release, charges=()) for release in noted]  # a record's name is another in each process


WAYS = {
    "greedy": {"do_sample": False},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
    "prompt-lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_lost_session_is_replayed(way: str, split: Split, model: Path) -> None:
    """With noise: a frame that was noised afresh on replay would change the tokens."""
    recipe = make_recipe(model, boundary={"forward": {"noise": 0.05}})
    single = way == "prompt-lookup"
    inputs = {key: value.repeat(1, 2) for key, value in prompts((9,)).items()} if single else prompts((3, 9, 6))

    def run(after: set[int]) -> tuple[torch.Tensor, list[Release], int]:
        side, service = split(recipe, generator=torch.Generator().manual_seed(1))
        evicting = Evicting(service, after)
        torch.manual_seed(3)
        tokens = side.generate(
            **inputs,
            min_new_tokens=LENGTH,
            max_new_tokens=LENGTH,
            stopping_criteria=StoppingCriteriaList([evicting]),
            **WAYS[way],
        )
        return tokens, releases(side), evicting.evicted

    tokens, noted, evicted = run({1, 2, 5})
    undisturbed, expected, _ = run(set())
    assert evicted == 3
    assert torch.equal(tokens, undisturbed)
    assert noted == expected


def test_abandoned_cache_frees_its_session(split: Split, recipe: Recipe) -> None:
    side, service = split(recipe)
    for _ in range(3):
        side.generate(**prompts((3,)), max_new_tokens=2, do_sample=False)
        gc.collect()
        assert len(service._sessions) == 1


def test_closed_cache(split: Split, recipe: Recipe) -> None:
    side, service = split(recipe)
    cache = side.new_cache()
    with torch.no_grad():
        side(torch.tensor([[4, 5]]), past_key_values=cache)
    assert len(service._sessions) == 1
    cache.session.close()
    assert len(service._sessions) == 0


def test_cropped_cache_goes_on(split: Split, recipe: Recipe) -> None:
    """The whole model's cache, cropped and continued, gives what it gives without the detour."""
    side, _ = split(recipe)
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    cache = side.new_cache()
    with torch.no_grad():
        side(ids[:, :3], past_key_values=cache)
        side(torch.tensor([[50, 51, 52]]), past_key_values=cache)
        cache.crop(-1)
        cache.crop(-2)
        got = side(ids[:, 3:], past_key_values=cache).logits
        expected = side(ids, use_cache=False).logits[:, 3:]
    assert distance(got, expected) < 1e-5


def test_new_instance_has_nothing_open(model: Path, recipe: Recipe, service: TrunkService) -> None:
    ask = connected(service, recipe)
    a, b = ask("a"), ask("b")
    for channel in (a, b):
        channel.call(pb.Decode(session=1, step=0, lengths=[2], hidden=codec.encode(hidden(2), "fp32")))
        channel.call(pb.Forward(step=5, lengths=[2], hidden=codec.encode(hidden(2), "fp32"), train=True))
    a = ask("a")
    gradient = codec.encode(hidden(2), "fp32")
    with pytest.raises(UnknownSessionError):
        a.call(pb.Decode(session=1, step=1, lengths=[2], hidden=gradient))
    with pytest.raises(UnknownStepError):
        a.call(pb.Backward(step=5, gradient=gradient))
    a.call(pb.Forward(step=1, lengths=[2], hidden=gradient, train=True))  # and it numbers from the start
    b.call(pb.Decode(session=1, step=1, lengths=[2], hidden=gradient))
    b.call(pb.Backward(step=5, gradient=gradient))


def test_same_instance_keeps_everything(recipe: Recipe, service: TrunkService) -> None:
    hello = greeting(Checkpoint(recipe.model.path), recipe)
    channel = LoopbackChannel(service, "a", greeting=hello)
    matrix = codec.encode(hidden(2), "fp32")
    channel.call(pb.Decode(session=1, step=0, lengths=[2], hidden=matrix))
    channel.call(pb.Forward(step=5, lengths=[2], hidden=matrix, train=True))
    again = LoopbackChannel(service, "a", greeting=hello)
    again.call(pb.Decode(session=1, step=1, lengths=[2], hidden=matrix))
    again.call(pb.Backward(step=5, gradient=matrix))


def connected(service: TrunkService, recipe: Recipe) -> Callable[[str], LoopbackChannel]:
    """A way for a new process of this silo to reach the service."""
    checkpoint = Checkpoint(recipe.model.path)
    return lambda name: LoopbackChannel(service, name, greeting=greeting(checkpoint, recipe))
