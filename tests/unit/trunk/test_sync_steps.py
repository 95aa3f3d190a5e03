"""The trunk's optimizer steps against a slow oracle: autograd on a copy of its part, one sequence at a time."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import MismatchError, ProtocolError, RoundLostError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from isthmus.wire.patience import Heard
from tests.conftest import make_recipe, save_tiny_model
from tests.oracle.twins import assert_same, random_b
from tests.unit.trunk.drill import Work, tensors_of

WIDTH = 32
RATE = 0.005
SOON, LONG = 0.02, 120.0
WAIT = 60.0
Tensors = dict[str, torch.Tensor]
WORK_A: Work = (1, (3, 5))
WORK_B: Work = (2, (4,))
WORK_C: Work = (3, (2, 2, 6))


class Trunk:
    """A service, and how to have it wait."""

    def __init__(self, recipe: Recipe, directory: RoleDirectory) -> None:
        self.recipe = recipe
        self.directory = directory
        self.service = TrunkService(recipe, directory)
        self.part = self.service._runner.part
        if not directory.last_round():
            adapters.load_adapter(self.part, random_b(adapters.adapter_of(self.part)))
            self.service._training.save(0)

    def patience(self, seconds: float) -> None:
        for waits in (self.service._steps, self.service._steps._commits):
            waits._patience = seconds

    def settle(self) -> None:
        """Wait until everything under way is done."""
        self.service._scheduler.submit(lambda: None).result(WAIT)

    def adapter(self) -> Tensors:
        return adapters.adapter_of(self.part)

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(self.service._training._adapter.state()["optimizer"])


class Silo:
    """A silo that sends what it is told to."""

    def __init__(self, trunk: Trunk, name: str) -> None:
        hello = greeting(Checkpoint(trunk.recipe.model.path), trunk.recipe)
        self.channel = LoopbackChannel(trunk.service, name, greeting=hello)
        self._last = 0

    def begin(self, round: int = 1, participants: tuple[str, ...] = ("a", "b")) -> Answer:
        return self.channel.submit(pb.Begin(round=round, participants=participants))

    def forward(self, work: Work) -> int:
        self._last += 1
        hidden = codec.encode(tensors_of(work)[0], "fp32")
        self.channel.call(pb.Forward(step=self._last, lengths=work[1], hidden=hidden, train=True))
        return self._last

    def backward(self, step: int, work: Work) -> None:
        gradient = codec.encode(tensors_of(work)[1], "fp32")
        self.channel.call(pb.Backward(step=step, gradient=gradient, reply=True))

    def work(self, *all_work: Work) -> None:
        for work in all_work:
            self.backward(self.forward(work), work)

    def commit(self, step: int = 1, *, weight: float, round: int = 1) -> Answer:
        return self.channel.submit(pb.Commit(round=round, step=step, weight=weight))

    def open(self, *participants: str, **start: Any) -> Answer:
        return self.channel.submit(pb.Begin(open=True, participants=participants, **start))

    def follow(self, step: int, *, weight: float = 1.0, round: int = 1, rate: float = RATE, **how: Any) -> Answer:
        optimizer = pb.Optimizer(kind="sgd", learning_rate=rate)
        return self.channel.submit(pb.Commit(round=round, step=step, weight=weight, optimizer=optimizer, **how))

    def end(self, round: int = 1) -> Answer:
        return self.channel.submit(pb.End(round=round))


class Oracle:
    """SGD by hand."""

    def __init__(self, trunk: Trunk) -> None:
        model = trunk.recipe.model
        self._part = load_part(Checkpoint(model.path), Cut(model.bottom, model.top), "trunk")
        adapters.add_adapter(self._part, trunk.recipe.lora, trunk.recipe.seed, freeze_a=False)
        adapters.load_adapter(self._part, trunk.adapter())
        self.named = adapters.trainable(self._part)
        self.start = adapters.adapter_of(self._part)

    def gradients(self, *all_work: Work) -> list[torch.Tensor]:
        self._part.zero_grad()
        for work in all_work:
            h_TD, gradient_TD = tensors_of(work)
            for h, gradient in zip(h_TD.split(work[1]), gradient_TD.split(work[1]), strict=True):
                self._part.hidden(inputs_embeds=h[None], use_cache=False)[0].backward(gradient)
        return [parameter.grad.clone() for parameter in self.named.values()]

    @torch.no_grad()
    def step(self, *shares: tuple[float, list[torch.Tensor]]) -> None:
        total = sum(weight for weight, _ in shares)
        for number, parameter in enumerate(self.named.values()):
            parameter -= RATE * sum(weight / total * held[number] for weight, held in shares)

    def agrees(self, trunk: Trunk) -> None:
        """The trunk's adapter moved as this one did."""
        trunk.settle()
        here, there = adapters.adapter_of(self._part), trunk.adapter()
        changes = [{name: side[name] - self.start[name] for name in self.start} for side in (there, here)]
        assert all(change.abs().max() > 1e-3 for change in changes[1].values())
        assert_same(*changes, 3e-4)


Build = Callable[..., Trunk]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), blocks=4, initializer_range=0.3)


@pytest.fixture
def build(model: Path, tmp_path: Path) -> Iterator[Build]:
    built: list[Trunk] = []

    def make(steps: int | None = 2, optimizer: str = "sgd", silos: tuple[str, ...] = ("a", "b"), **more: Any) -> Trunk:
        train = {"optimizer": optimizer, "learning_rate": RATE, "evaluate": False, **more}
        if steps is not None:
            train["steps"] = steps
        recipe = make_recipe(model, silos=silos, train=train, trunk={"patience": LONG})
        built.append(Trunk(recipe, RunDirectory(tmp_path).role("trunk")))
        return built[-1]

    yield make
    for trunk in built:
        trunk.service.stop()


def begun(trunk: Trunk) -> tuple[Silo, Silo]:
    """Both silos at the start of round 1."""
    a, b = Silo(trunk, "a"), Silo(trunk, "b")
    first = a.begin()
    trunk.settle()
    assert not first.done()
    b.begin().result(WAIT)
    first.result(WAIT)
    return a, b


def whole_round(trunk: Trunk, a: Silo, b: Silo, number: int) -> None:
    """A round of one step."""
    for answer in (a.begin(number), b.begin(number)):
        answer.result(WAIT)
    a.work(WORK_A)
    b.work((number, (3,)))
    for answer in (a.commit(weight=3, round=number), b.commit(weight=1, round=number)):
        answer.result(WAIT)


def test_step_is_the_mean_by_tokens(build: Build) -> None:
    trunk = build()
    oracle = Oracle(trunk)
    a, b = begun(trunk)
    for step in (1, 2):
        assert trunk.directory.rounds() == {0}
        a.work(WORK_A)
        b.work(WORK_B)
        first = a.commit(step, weight=3)
        trunk.settle()
        assert not first.done()
        assert b.commit(step, weight=4).result(WAIT).contributors == 2
        assert first.result(WAIT).contributors == 2
        oracle.step((3, oracle.gradients(WORK_A)), (4, oracle.gradients(WORK_B)))
        oracle.agrees(trunk)
    assert_exact(trunk.directory.load_round(1)["adapter"], trunk.adapter())


def test_gradients_accumulate(build: Build) -> None:
    trunk = build()
    oracle = Oracle(trunk)
    a, b = begun(trunk)
    a.work(WORK_A, WORK_C)
    first, second = b.forward(WORK_B), b.forward(WORK_C)  # both before either's backward
    b.backward(second, WORK_C)
    b.backward(first, WORK_B)
    for answer in (a.commit(weight=1), b.commit(weight=2)):
        answer.result(WAIT)
    oracle.step((1, oracle.gradients(WORK_A, WORK_C)), (2, oracle.gradients(WORK_B, WORK_C)))
    oracle.agrees(trunk)


def test_slow_silo_joins_the_next_step(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trunk = build()
    oracle = Oracle(trunk)
    a, b = begun(trunk)
    late = b.forward(WORK_B)
    a.work(WORK_A)
    trunk.patience(SOON)
    assert a.commit(1, weight=3).result(WAIT).contributors == 1
    oracle.step((3, oracle.gradients(WORK_A)))
    oracle.agrees(trunk)

    trunk.patience(LONG)
    b.backward(late, WORK_B)  # its forward was with the old weights
    a.work(WORK_C)
    waiting = b.commit(1, weight=4)
    assert a.commit(2, weight=2).result(WAIT).contributors == 2
    assert waiting.result(WAIT).contributors == 2
    oracle.step((4, oracle.gradients(WORK_B)), (2, oracle.gradients(WORK_C)))
    oracle.agrees(trunk)

    end = trunk.directory.load_round(1)["adapter"]  # b has a step to go, but if it dies a's round is over
    assert_exact(end, trunk.adapter())
    b.work(WORK_A)
    assert b.commit(2, weight=1).result(WAIT).contributors == 1
    oracle.step((1, oracle.gradients(WORK_A)))
    oracle.agrees(trunk)
    assert_exact(trunk.directory.load_round(1)["adapter"], trunk.adapter())
    lines = read_journal(trunk.directory.path / "metrics.jsonl")
    assert [line["silos"] for line in lines] == [["a"], ["a", "b"], ["b"]]
    said = [record.getMessage() for record in caplog.records if record.name == "isthmus.trunk.sync_steps"]
    assert said == [f"trunk: round 1 {what}" for what in ("begins with a, b", "goes on without b", "is over")]


def test_a_trunk_that_hears_nobody_steps_without_nobody(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network is broken for longer than its patience, while one silo waits at the step and the other computes."""
    looks: list[set[str]] = []

    def silent(self: Heard, peers: Any) -> bool:
        looks.append(set(peers))
        return True

    monkeypatch.setattr(Heard, "silent", silent)
    trunk = build(steps=1)
    a, b = begun(trunk)
    a.work(WORK_A)
    trunk.patience(SOON)
    waiting = a.commit(1, weight=3)
    end = time.monotonic() + WAIT
    while len(looks) < 2:
        assert time.monotonic() < end, "patience did not end"
        time.sleep(0.005)
    assert looks[0] == {"a"}
    assert not waiting.done()
    b.work(WORK_B)
    assert b.commit(1, weight=4).result(WAIT).contributors == 2
    assert waiting.result(WAIT).contributors == 2


def test_after_an_outage_a_vote_waits_for_all_with_its_whole_patience(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that is back does not end the wait, though the vote began longer ago than patience."""
    looks: list[set[str]] = []

    def silent(self: Heard, peers: Any) -> bool:
        looks.append(set(peers))
        return True

    monkeypatch.setattr(Heard, "silent", silent)
    trunk = build(steps=1, silos=("a", "b", "c"))
    trunk.patience(SOON)
    a, b, c = (Silo(trunk, name) for name in "abc")
    votes = [a.begin(participants=("a", "b", "c"))]
    end = time.monotonic() + WAIT
    while len(looks) < 2:
        assert time.monotonic() < end, "patience did not end"
        time.sleep(0.005)
    clock = trunk.service._steps._clock  # type: ignore[union-attr]
    votes.append(b.begin(participants=("a", "b", "c")))
    trunk.settle()
    assert trunk.service._steps._clock is clock  # type: ignore[union-attr]
    assert not any(vote.done() for vote in votes)
    votes.append(c.begin(participants=("a", "b", "c")))
    for vote in votes:
        vote.result(WAIT)


def test_who_is_at_work_when_the_root_has_finished_the_round_has_lost_it(build: Build) -> None:
    trunk = build(steps=1)
    a, b = begun(trunk)
    b.work(WORK_B)
    a.work(WORK_A)
    trunk.patience(SOON)
    assert a.commit(weight=3).result(WAIT).contributors == 1
    trunk.patience(LONG)
    trunk.service.settle(1, {}).result(WAIT)
    after = trunk.adapter()
    with pytest.raises(RoundLostError, match="b is not in round 1"):
        b.commit(weight=4).result(WAIT)
    assert_exact(trunk.adapter(), after)
    assert_exact(trunk.directory.load_round(1)["adapter"], after)
    whole_round(trunk, a, b, 2)


def test_latecomer_joins_the_round_under_way(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trunk = build(steps=1)
    oracle = Oracle(trunk)
    a, b = Silo(trunk, "a"), Silo(trunk, "b")
    trunk.patience(SOON)
    a.begin().result(WAIT)
    trunk.patience(LONG)
    a.work(WORK_A)
    b.begin().result(WAIT)
    assert "trunk: b joins round 1" in caplog.text
    b.work(WORK_B)
    waiting = b.commit(weight=1)
    assert a.commit(weight=1).result(WAIT).contributors == 2
    waiting.result(WAIT)
    oracle.step((1, oracle.gradients(WORK_A)), (1, oracle.gradients(WORK_B)))
    oracle.agrees(trunk)


def assert_exact(actual: Tensors, expected: Tensors) -> None:
    assert_same(actual, expected, 0.0)


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same AdamW state."""
    assert actual["state"].keys() == expected["state"].keys() != set()
    for number, values in expected["state"].items():
        assert all(torch.equal(actual["state"][number][name], value) for name, value in values.items())


@pytest.mark.parametrize("way", ["begin", "restore", "new-process"])
def test_back_to_a_round_exactly(build: Build, way: str) -> None:
    trunk = build(steps=1, optimizer="adamw")
    a, b = Silo(trunk, "a"), Silo(trunk, "b")
    whole_round(trunk, a, b, 1)
    adapter, state = trunk.adapter(), trunk.state()
    whole_round(trunk, a, b, 2)
    onward = trunk.adapter()
    if way == "new-process":
        trunk = build(steps=1, optimizer="adamw")
        assert_exact(trunk.adapter(), onward)
        a, b = Silo(trunk, "a"), Silo(trunk, "b")
    if way != "begin":
        trunk.service.restore(1)
    else:
        a.work(WORK_C)  # under way, and void with the new begin
        for answer in (a.begin(2), b.begin(2)):
            answer.result(WAIT)
    assert_exact(trunk.adapter(), adapter)
    assert_same_state(trunk.state(), state)
    whole_round(trunk, a, b, 2)
    assert_exact(trunk.adapter(), onward)


def test_round_without_a_state(build: Build) -> None:
    trunk = build(steps=1)
    a, b = Silo(trunk, "a"), Silo(trunk, "b")
    before = trunk.adapter()
    for answer in (a.begin(5), b.begin(5)):
        with pytest.raises(ProtocolError, match="no state of round 4") as caught:
            answer.result(WAIT)
        assert "run directory" in caught.value.remedy
    assert_exact(trunk.adapter(), before)
    whole_round(trunk, a, b, 1)


def test_silos_of_unequal_rows_bring_their_own_steps(build: Build) -> None:
    """The shorter one is not waited for once it is done, and the rate is that of the one with most steps."""
    trunk = build(steps=None, epochs=1, schedule="linear", rounds=2)
    a, b = Silo(trunk, "a"), Silo(trunk, "b")
    plans = {"a": pb.Steps(count=1, before=0, total=2), "b": pb.Steps(count=2, before=0, total=4)}
    begins = [
        silo.channel.submit(pb.Begin(round=1, participants=("a", "b"), steps=plans[name]))
        for name, silo in (("a", a), ("b", b))
    ]
    for answer in begins:
        answer.result(WAIT)
    rates = []
    step = trunk.service._training.step
    trunk.service._training.step = lambda *given, rate, **how: (  # type: ignore[assignment, method-assign]
        rates.append(rate),
        step(*given, rate=rate, **how),
    )
    a.work(WORK_A)
    b.work(WORK_B)
    answers = [a.commit(1, weight=1.0), b.commit(1, weight=1.0)]
    assert [answer.result(WAIT).contributors for answer in answers] == [2, 2]
    b.work(WORK_B)
    assert b.commit(2, weight=1.0).result(WAIT).contributors == 1
    assert rates == pytest.approx([RATE, RATE * 3 / 4])
    assert trunk.directory.last_round() == 1


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [
        (None, pb.Steps(count=2, before=0, total=4)),
        (1, None),
        (1, pb.Steps(count=0, before=0, total=4)),
        (1, pb.Steps(count=3, before=2, total=4)),
        (1, pb.Steps(count=1, before=4, total=2)),
        (1, pb.Steps(count=1, before=0, total=2**32 - 1)),
        (1, pb.Steps(count=1, before=1, total=4)),
        (3, pb.Steps(count=1, before=0, total=4)),
    ],
)
def test_steps_that_do_not_fit_the_recipe_are_refused(epochs: int | None, steps: pb.Steps | None, build: Build) -> None:
    trunk = build(steps=None, **({} if epochs is None else {"epochs": epochs}))
    with pytest.raises(ProtocolError, match=r"train\.epochs|steps after") as caught:
        Silo(trunk, "a").channel.call(pb.Begin(round=1, participants=("a", "b"), steps=steps))
    assert caught.value.remedy


def moved(trunk: Trunk, before: Tensors) -> Tensors:
    trunk.settle()
    return {name: tensor - before[name] for name, tensor in trunk.adapter().items()}


def scaled(tensors: Tensors, factor: float) -> Tensors:
    return {name: factor * tensor for name, tensor in tensors.items()}


def test_an_open_round_steps_as_its_silo_says_and_keeps_gradients_until_they_are_dropped(build: Build) -> None:
    trunk = build()
    a, before = Silo(trunk, "a"), trunk.adapter()
    a.work(WORK_A)  # before the round begins: the trunk is where it starts
    begun = a.open().result(WAIT)
    assert (begun.round, begun.start) == (1, 0)
    a.follow(1).result(WAIT)
    once = moved(trunk, before)
    a.follow(2, rate=2 * RATE, scale=0.5).result(WAIT)
    assert_same(moved(trunk, before), scaled(once, 2), 1e-4)
    oracle = Oracle(trunk)
    for step, keep in ((3, 0.0), (4, 1.0)):
        number = a.forward(WORK_C)
        gradient = codec.encode(tensors_of(WORK_C)[1], "fp32")
        answer = a.channel.call(pb.Backward(step=number, gradient=gradient, reply=True, keep=keep))
        kept = trunk.service._training._silos["a"].gradients
        assert answer.norm == pytest.approx(float(torch.cat([one.flatten() for one in kept]).norm()))
        if not keep:
            a.follow(step).result(WAIT)
            oracle.step((1, oracle.gradients(WORK_C)))
            oracle.agrees(trunk)


def test_open_rounds_are_numbered_saved_and_restored(build: Build) -> None:
    trunk = build()
    a = Silo(trunk, "a")
    states, digests = [trunk.adapter()], []
    for number in (1, 2):
        begun = a.open().result(WAIT)
        assert (begun.round, begun.start) == (number, number - 1)
        a.work((number, (3,)))
        a.follow(1, round=number).result(WAIT)
        digests.append(a.end(number).result(WAIT).digest)
        states.append(trunk.adapter())
        assert_exact(trunk.directory.load_round(number)["adapter"], states[-1])
    begun = a.open(start=1, digest=digests[0]).result(WAIT)
    assert (begun.round, begun.start, begun.digest) == (3, 1, digests[0])
    assert_exact(trunk.adapter(), states[1])
    with pytest.raises(MismatchError, match="round 1 is not the one"):
        a.open(start=1, digest=digests[1]).result(WAIT)
    with pytest.raises(ProtocolError, match="no state of round 7"):
        a.open(start=7).result(WAIT)
    assert a.open(start=2).result(WAIT).round == 3
    assert_exact(trunk.adapter(), states[2])


def test_silos_of_an_open_round_step_and_end_together(build: Build) -> None:
    trunk = build()
    oracle = Oracle(trunk)
    a, b = Silo(trunk, "a"), Silo(trunk, "b")
    first = a.open("a", "b")
    trunk.settle()
    assert not first.done()
    b.open("b", "a").result(WAIT)
    for step in (1, 2, 3):  # more than the recipe's
        a.work(WORK_A)
        b.work(WORK_B)
        waiting = a.follow(step, weight=3)
        trunk.settle()
        assert not waiting.done()
        assert b.follow(step, weight=4).result(WAIT).contributors == 2
        oracle.step((3, oracle.gradients(WORK_A)), (4, oracle.gradients(WORK_B)))
        for silo in ("a", "b"):
            trunk.service._training._silos[silo].gradients = None
    oracle.agrees(trunk)
    ending = a.end()
    assert b.follow(4, weight=0).result(WAIT).contributors == 1
    assert not ending.done()
    assert b.end().result(WAIT).digest == ending.result(WAIT).digest == trunk.directory.digest(1)
    with pytest.raises(RoundLostError):
        b.follow(5).result(WAIT)


def test_silos_that_differ_in_their_optimizers_are_told(build: Build) -> None:
    trunk = build()
    a, b = Silo(trunk, "a"), Silo(trunk, "b")
    for answer in (a.open("a", "b"), b.open("a", "b")):
        answer.result(WAIT)
    a.work(WORK_A)
    b.work(WORK_B)
    for answer in (a.follow(1), b.follow(1, rate=2 * RATE)):
        with pytest.raises(ProtocolError, match="optimizers of a, b differ"):
            answer.result(WAIT)


def test_a_new_process_undoes_its_open_round_or_joins_that_of_others(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    trunk = build()
    a, before = Silo(trunk, "a"), trunk.adapter()
    a.open().result(WAIT)
    a.work(WORK_A)
    a.follow(1).result(WAIT)
    a = Silo(trunk, "a")
    trunk.settle()
    assert "trunk: another process of a has connected; its round is undone" in caplog.text
    assert_exact(trunk.adapter(), before)
    b = Silo(trunk, "b")
    for answer in (a.open("a", "b"), b.open("a", "b")):
        answer.result(WAIT)
    a.work(WORK_A)
    waiting = a.follow(1)
    b = Silo(trunk, "b")
    trunk.settle()
    assert waiting.result(WAIT).contributors == 1
    assert b.open("a", "b").result(WAIT).round == 1
    b.work(WORK_B)
    waiting = b.follow(1)
    assert a.follow(2).result(WAIT).contributors == 2
    ending = a.end()
    trunk.settle()
    assert not ending.done()
    b.end().result(WAIT)


def test_a_round_of_others_is_not_taken_over_unasked(build: Build) -> None:
    trunk = build()
    a, b = Silo(trunk, "a"), Silo(trunk, "b")
    a.open().result(WAIT)
    for participants in ((), ("a", "b")):
        with pytest.raises(ProtocolError, match="a is training with the trunk"):
            b.open(*participants).result(WAIT)
    assert b.open(start=0).result(WAIT).round == 1
    with pytest.raises(RoundLostError):
        a.follow(1).result(WAIT)
    with pytest.raises(ProtocolError, match="silos that train together differ"):
        a.open("a", "b", start=0) and b.open("a", "b", start=1).result(WAIT)
    trunk.service.restore(0)
    a, b = begun(trunk)
    with pytest.raises(ProtocolError, match="round of the federation is running"):
        a.open().result(WAIT)
    with pytest.raises(RoundLostError):
        a.end().result(WAIT)
    with pytest.raises(ProtocolError, match="the recipe's"):
        a.follow(1).result(WAIT)
