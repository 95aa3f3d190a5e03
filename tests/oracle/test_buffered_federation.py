"""Whole federations that wait for nobody: beside those that do, and replayed by hand from what the silos sent."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.engines.export import final_adapter
from isthmus.errors import IsthmusError, PeerGoneError, RoundLostError
from isthmus.federation.aggregator import root_service
from isthmus.federation.planner import shared_tensors
from isthmus.federation.rounds import Aggregator
from isthmus.model import adapters
from isthmus.recipe import Recipe
from isthmus.silo.worker import Worker
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel, LoopbackChannel
from tests.oracle.conftest import Models
from tests.oracle.test_federation import SILOS, federate, federation_of
from tests.oracle.twins import Tensors, assert_same, loopback

WAIT = 120.0
FAST, SLOW = ("north", "east", "south"), "west"


def recipe_of(model: Path, folder: Path, **changed: Any) -> Recipe:
    """Several steps of Adam a round. ``changed``: keys of sections, by name."""
    values = federation_of(model, folder).model_dump(exclude_none=True)
    values["train"] |= {"steps": 2, "optimizer": "adamw"}
    values["trunk"] |= {"together": 1}  # what shares a pass changes last bits
    for section, keys in changed.items():
        values[section] = keys if isinstance(keys, list) else values[section] | keys
    return Recipe.of(values)


@dataclass
class Root:
    """The root's service as the wire shows it: what came, and a new one in its place that gets what is unanswered."""

    recipe: Recipe
    run: RunDirectory
    updates: list[tuple[str, pb.Update]] = field(default_factory=list)
    """Those that were taken."""
    lost: list[tuple[str, pb.Update]] = field(default_factory=list)
    """Those that were taken by a root that died with them in its buffer."""
    refused: list[tuple[str, IsthmusError]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._open: dict[int, tuple[str, Message, Answer]] = {}
        self.service = root_service(self.recipe, self.run.role("root"))

    def die(self) -> bool:
        """Start again, if anything is lost by it."""
        with self._lock:
            buffer = self.service._buffer  # type: ignore[attr-defined]
            for held in buffer:
                self.lost.append([one for one in self.updates if one[0] == held][-1])
                self.updates.remove(self.lost[-1])
            if buffer:
                self.service = root_service(self.recipe, self.run.role("root"))
                for peer, request, answer in list(self._open.values()):
                    self._ask(peer, request, answer)
            return bool(buffer)

    def handle(self, peer: str, request: Message) -> Answer:
        answer: Answer = Answer()
        with self._lock:
            self._open[id(answer)] = peer, request, answer
            self._ask(peer, request, answer)
        return answer

    def _ask(self, peer: str, request: Message, answer: Answer) -> None:
        asked = self.service
        try:
            asked.handle(peer, request).add_done_callback(lambda done: self._settle(asked, peer, request, answer, done))
        except IsthmusError as error:
            self.refused.append((peer, error))
            del self._open[id(answer)]
            answer.set_exception(error)

    def _settle(self, asked: Aggregator, peer: str, request: Message, answer: Answer, done: Answer) -> None:
        if asked is not self.service:  # it is gone
            return
        del self._open[id(answer)]
        if isinstance(request, pb.Update):
            self.updates.append((peer, request))
        answer.set_result(done.result())

    @property
    def version(self) -> int:
        return self.service._planner.completed  # type: ignore[attr-defined]


class Watched(LoopbackChannel):
    """A way to the trunk on which something happens before each commit."""

    before: Callable[[pb.Commit], None]

    def submit(self, request: Message) -> Answer:
        if isinstance(request, pb.Commit):
            self.before(request)
        return super().submit(request)


class Federation:
    """Workers in threads, with one trunk and one root."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.run = recipe, RunDirectory.create(folder, recipe)
        self.trunk = TrunkService(recipe, self.run.role("trunk"))
        self.root = Root(recipe, self.run)

    def work(self, name: str, before: Callable[[pb.Commit], None] = lambda commit: None) -> Tensors:
        """One silo's whole part; returns its ends' adapters."""
        trunk = loopback(self.trunk, name, self.recipe)
        assert isinstance(trunk, LoopbackChannel)
        trunk.__class__, trunk.before = Watched, before  # type: ignore[attr-defined]
        ways: dict[str, Channel] = {"trunk": trunk, "root": LoopbackChannel(self.root, name)}
        worker = Worker(self.recipe, name, self.run.role(name), **ways)
        try:
            worker.run()
            return {key: one for part in worker._silo.parts for key, one in adapters.adapter_of(part).items()}
        finally:
            worker.close()

    def finish(self, **before: Callable[[pb.Commit], None]) -> list[Tensors]:
        """All silos' parts at once."""
        names = [silo.name for silo in self.recipe.silo]
        with ThreadPoolExecutor(len(names)) as threads:
            works = [threads.submit(self.work, name, *filter(None, [before.get(name)])) for name in names]
            return [work.result(WAIT) for work in works]

    def lines(self) -> list[dict[str, Any]]:
        return read_journal(self.run.role("root").path / "metrics.jsonl")

    def close(self) -> None:
        self.trunk.stop()


def assert_equal(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def assert_versions(federation: Federation) -> None:
    """Every version on disk is the one before it and what its silos sent, each by its share and its age."""
    before = shared_tensors(federation.recipe)
    before = {name: tensor.double() for name, tensor in before.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
    sent = {(peer, update.round): update for peer, update in federation.root.updates}
    lines = federation.lines()
    assert [line["round"] for line in lines] == list(range(1, federation.recipe.train.rounds + 1))
    for line in lines:
        total = sum(line["weights"].values())
        for silo, age in line["staleness"].items():
            update = sent.pop((silo, line["round"] - age))
            assert update.weight == line["weights"][silo]
            share = update.weight / total / math.sqrt(1 + age)
            for name, change in codec.decode_named(update.tensors, shapes).items():
                before[name] = before[name] + share * change.double()
        kept = federation.run.role("root").load_round(line["round"])["shared"]
        assert_same(kept, {name: tensor.float() for name, tensor in before.items()}, 1e-6)
    assert sent == {}


def test_a_buffer_for_all_is_the_federation_that_waits(models: Models, tmp_path: Path) -> None:
    """To the last bit, where the trunk does not train: its steps are one a silo here, and one for all there."""
    boundary = {"gradients": False, "residual": True}
    waiting = recipe_of(models("llama"), tmp_path, boundary=boundary, federation={"optimizer": {"kind": "momentum"}})
    expected = federate(waiting, RunDirectory.create(tmp_path / "waiting", waiting))
    buffer = {"asynchronous": {"buffer": len(SILOS)}, "optimizer": {"kind": "momentum"}}
    federation = Federation(
        recipe_of(models("llama"), tmp_path, boundary=boundary, federation=buffer), tmp_path / "run"
    )
    ends = federation.finish()
    assert {age for line in federation.lines() for age in line["staleness"].values()} == {0}
    for own, other in zip(ends, expected[1], strict=True):
        assert_equal(own, other)
    assert_equal(adapters.adapter_of(federation.trunk._runner.part), expected[0])
    assert_equal(final_adapter(federation.run)[1], expected[0] | expected[1][0])
    federation.close()


def test_one_silo_is_the_federation_that_waits(models: Models, tmp_path: Path) -> None:
    """To the last bit, with the trunk's training."""
    silo = recipe_of(models("llama"), tmp_path).model_dump(exclude_none=True)["silo"]
    ends = []
    for buffer in ({}, {"asynchronous": {"buffer": 1}}):
        recipe = recipe_of(models("llama"), tmp_path, silo=list(silo[:1]), federation=buffer)
        federation = Federation(recipe, tmp_path / f"run{len(ends)}")
        ends.append((federation.finish()[0], adapters.adapter_of(federation.trunk._runner.part)))
        number, whole = final_adapter(federation.run)
        assert number == recipe.train.rounds
        assert_equal(whole, ends[-1][0] | ends[-1][1])
        federation.close()
    assert_equal(ends[1][0], ends[0][0])
    assert_equal(ends[1][1], ends[0][1])


def test_the_fast_go_on_and_the_slow_still_counts(models: Models, tmp_path: Path) -> None:
    recipe = recipe_of(models("llama"), tmp_path, federation={"asynchronous": {"buffer": 3}}, train={"rounds": 6})
    federation = Federation(recipe, tmp_path / "run")

    def until_three(commit: pb.Commit) -> None:
        if commit.round == 1:
            _wait(lambda: federation.root.version >= 3)

    ends = federation.finish(**{SLOW: until_three})
    assert_versions(federation)
    lines = federation.lines()
    assert [set(line["weights"]) for line in lines[:3]] == [set(FAST)] * 3
    assert all(line["staleness"] == dict.fromkeys(FAST, 0) for line in lines[:3])
    first = next(line for line in lines if SLOW in line["weights"])
    assert first["staleness"][SLOW] == first["round"] - 1 >= 3
    own = federation.run.role(SLOW)
    assert 1 in own.rounds()
    assert 2 not in own.rounds()
    adam = own.load_round(own.last_round())["optimizer"]["state"][0]
    assert adam["step"] == recipe.train.steps * len(own.rounds())  # it goes on from the last one it had a part in
    number, whole = final_adapter(federation.run)
    assert number == recipe.train.rounds
    for own in ends:  # all end with the last version
        assert_equal({name: whole[name] for name in own}, own)
    trunk = adapters.adapter_of(federation.trunk._runner.part)
    assert_equal({name: whole[name] for name in trunk}, trunk)
    federation.close()


def test_a_silo_that_is_too_slow_is_told_and_goes_on_with_the_newest(models: Models, tmp_path: Path) -> None:
    recipe = recipe_of(
        models("llama"), tmp_path, federation={"asynchronous": {"buffer": 3, "staleness": 1}}, train={"rounds": 5}
    )
    federation = Federation(recipe, tmp_path / "run")
    begun: list[int] = []

    def until_two(commit: pb.Commit) -> None:
        if commit.round not in begun:
            begun.append(commit.round)
        if commit.round == 1:
            _wait(lambda: federation.root.version >= 2)

    federation.finish(**{SLOW: until_two})
    assert_versions(federation)
    peer, error = federation.root.refused[0]
    assert (peer, type(error)) == (SLOW, RoundLostError)
    assert "the recipe allows 1" in error.message
    assert begun[1] >= 3
    assert all(age <= 1 for line in federation.lines() for age in line["staleness"].values())
    federation.close()


def test_a_root_that_dies_with_updates_in_its_buffer(models: Models, tmp_path: Path) -> None:
    """Those silos train again on the version that is on disk; no update is lost in silence, and none counts twice."""
    recipe = recipe_of(models("llama"), tmp_path, federation={"asynchronous": {"buffer": 3}}, train={"rounds": 8})
    federation = Federation(recipe, tmp_path / "run")
    started: list[int] = []

    def restart(commit: pb.Commit) -> None:
        if commit.round >= 2 and not started:
            _wait(federation.root.die)
            started.append(federation.root.version)

    federation.finish(**{FAST[0]: restart})
    assert_versions(federation)
    (version,) = started
    again = {(peer, update.round) for peer, update in federation.root.updates}
    lost = {(peer, update.round) for peer, update in federation.root.lost}
    assert lost
    assert {(peer, round) for peer, round in lost if round == version + 1} <= again
    federation.close()


def test_a_silo_that_dies_is_not_waited_for_and_may_come_back(models: Models, tmp_path: Path) -> None:
    recipe = recipe_of(models("llama"), tmp_path, federation={"asynchronous": {"buffer": 2}}, train={"rounds": 6})
    federation = Federation(recipe, tmp_path / "run")

    def die(commit: pb.Commit) -> None:
        if commit.step == 2:
            raise PeerGoneError("the silo dies", remedy="start it again")

    def until_back(commit: pb.Commit) -> None:
        if commit.round == 5:
            _wait(lambda: any(peer == SLOW for peer, _ in federation.root.updates))

    with pytest.raises(PeerGoneError):
        federation.work(SLOW, die)
    with ThreadPoolExecutor(len(SILOS)) as threads:
        others = [threads.submit(federation.work, name, until_back) for name in FAST]
        _wait(lambda: federation.root.version >= 3)
        ends = [threads.submit(federation.work, SLOW), *others]
        first, *rest = [one.result(WAIT) for one in ends]
    assert_versions(federation)
    assert all(torch.equal(other[name], tensor) for other in rest for name, tensor in first.items())
    assert SLOW in {silo for line in federation.lines()[3:] for silo in line["weights"]}
    federation.close()


def _wait(fulfilled: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not fulfilled():
        assert time.monotonic() < end
        time.sleep(0.005)
