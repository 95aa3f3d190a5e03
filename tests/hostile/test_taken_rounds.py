"""A silo that begins rounds of its own takes none away from silos that are at work, or that wait for another."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import ProtocolError, RoundLostError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer
from tests.conftest import save_tiny_model
from tests.unit.trunk.drill import Drill, Work, recipe_of, results
from tests.unit.trunk.talk import WAIT

GOOD, OTHER, BAD = NAMES = ("good", "other", "bad")
WORK: dict[str, Work] = {GOOD: (1, (3, 5)), OTHER: (2, (4,)), BAD: (3, (2, 2))}
SOON = 0.05
Build = Callable[[], Drill]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), blocks=4, initializer_range=0.3)


@pytest.fixture
def build(model: Path, tmp_path: Path) -> Iterator[Build]:
    """Starts a trunk of its own at each call."""
    drills: list[Drill] = []

    def start() -> Drill:
        recipe = recipe_of(model, silos=NAMES, train={"steps": 2, "learning_rate": 0.1}, gather=0.0)
        drills.append(Drill(recipe, tmp_path / f"run{len(drills)}"))
        return drills[-1]

    yield start
    for drill in drills:
        drill.service.stop()


def step(drill: Drill, number: int, names: tuple[str, ...], round: int = 1) -> None:
    for name in names:
        drill.silos[name].work(WORK[name])
    results([drill.silos[name].commit(number, 1.0, round) for name in names])


def settle(drill: Drill) -> None:
    drill.service._scheduler.submit(lambda: None).result(WAIT)


def waits(drill: Drill, answer: Answer) -> bool:
    settle(drill)
    return not answer.done()


def undisturbed(build: Build, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    drill = build()
    drill.begin(1, names)
    for number in (1, 2):
        step(drill, number, names)
    return drill.adapter()


def saved(drill: Drill, number: int) -> Any:
    return drill.directory.load_round(number)["adapter"]


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("named", [(BAD,), (BAD, OTHER)], ids=["alone", "with another"])
def test_a_round_is_not_begun_again_under_silos_that_are_at_work(named: tuple[str, ...], build: Build) -> None:
    expected = undisturbed(build, (GOOD, BAD))
    drill = build()
    drill.begin(1, (GOOD, BAD))
    step(drill, 1, (GOOD, BAD))
    stolen = drill.silos[BAD].begin(1, named)
    assert waits(drill, stolen)
    step(drill, 2, (GOOD, BAD))
    assert_same(saved(drill, 1), expected)

    drill.service._steps._patience = SOON
    answers = [drill.silos[name].begin(2, (GOOD, OTHER)) for name in (GOOD, OTHER)]
    results(answers)
    assert_same(drill.adapter(), expected)
    step(drill, 1, (GOOD, OTHER), 2)


@pytest.mark.parametrize("number", [3, 7, 999])
def test_a_round_that_cannot_be_is_refused_and_nobody_loses_theirs(number: int, build: Build) -> None:
    expected = undisturbed(build, NAMES)
    drill = build()
    drill.begin(1, NAMES)
    step(drill, 1, NAMES)
    with pytest.raises(ProtocolError, match=f"no state of round {number - 1}") as caught:
        drill.silos[BAD].begin(number, (BAD,)).result(WAIT)
    assert caught.value.remedy
    step(drill, 2, NAMES)
    assert_same(drill.adapter(), expected)


def test_silos_that_wait_for_a_round_are_not_sent_into_another(build: Build) -> None:
    drill = build()
    drill.begin(1, NAMES)
    for number in (1, 2):
        step(drill, number, NAMES)
    expected, waiting = drill.adapter(), drill.silos[GOOD].begin(2, NAMES)
    wrong = drill.silos[BAD].begin(1, (BAD,))  # an earlier one, to undo what was trained since
    assert waits(drill, waiting)
    results([waiting, drill.silos[OTHER].begin(2, NAMES)])
    with pytest.raises(RoundLostError, match="bad is not in round 1") as caught:
        wrong.result(WAIT)
    assert caught.value.remedy
    drill.silos[BAD].begin(2, NAMES).result(WAIT)
    assert_same(drill.adapter(), expected)
    step(drill, 1, (BAD, GOOD, OTHER), 2)  # who joined late arrives first, so that the others do not go on without it


def test_an_earlier_round_is_not_begun_beside_one_that_waits(build: Build) -> None:
    """Of two silos the honest one has its way."""
    drill = build()
    drill.begin(1, (GOOD, BAD))
    for number in (1, 2):
        step(drill, number, (GOOD, BAD))
    expected = drill.adapter()
    wrong, right = drill.silos[BAD].begin(1, (BAD, OTHER)), drill.silos[GOOD].begin(2, (GOOD, BAD))
    right.result(WAIT)
    with pytest.raises(RoundLostError):
        wrong.result(WAIT)
    assert_same(drill.adapter(), expected)


@pytest.mark.parametrize("named", [(GOOD, OTHER), NAMES], ids=["without it", "with it"])
def test_who_began_alone_is_not_joined_in_the_midst_of_it(named: tuple[str, ...], build: Build) -> None:
    """With nobody there, one silo's round begins; the others' begins anew once more ask for it than are at work."""
    drill = build()
    drill.silos[BAD].begin(1, (BAD,)).result(WAIT)
    step(drill, 1, (BAD,))
    honest = [drill.silos[name].begin(1, named) for name in (GOOD, OTHER)]
    if BAD in named:
        assert all(waits(drill, answer) for answer in honest)
        honest.append(drill.silos[BAD].begin(1, named))
    results(honest)
    assert_same(drill.adapter(), saved(drill, 0))
    for number in (1, 2):
        step(drill, number, named)
    assert_same(drill.adapter(), undisturbed(build, named))


def test_most_silos_begin_their_round_again_at_once(build: Build) -> None:
    """A round that the root has lost: the one that does not know yet has it taken away."""
    drill = build()
    drill.begin(1, NAMES)
    step(drill, 1, NAMES)
    results([drill.silos[name].begin(1, (GOOD, OTHER)) for name in (GOOD, OTHER)])
    with pytest.raises(RoundLostError):
        drill.silos[BAD].commit(2, 0.0).result(WAIT)
    for number in (1, 2):
        step(drill, number, (GOOD, OTHER))
    assert_same(drill.adapter(), undisturbed(build, (GOOD, OTHER)))


def test_asking_for_one_round_and_then_for_another_holds_up_nobody(build: Build) -> None:
    drill = build()
    drill.service._steps._commits._patience = 1.0  # it may be in their round, but takes no step
    drill.silos[BAD].channel.submit(pb.Begin(round=1, participants=NAMES))
    drill.silos[BAD].channel.submit(pb.Begin(round=1, participants=(BAD,)))
    results([drill.silos[name].begin(1, (GOOD, OTHER)) for name in (GOOD, OTHER)])
    step(drill, 1, (GOOD, OTHER))


def test_asking_without_end_takes_nothing_from_silos_at_work(build: Build) -> None:
    expected = undisturbed(build, (GOOD, OTHER))
    drill = build()
    stop = threading.Event()

    def ask() -> None:
        for more in itertools.cycle([(), (OTHER,)]):
            if stop.is_set():
                return
            drill.silos[BAD].channel.submit(pb.Begin(round=1, participants=(BAD, *more)))
            time.sleep(0.002)

    flood = threading.Thread(target=ask)
    flood.start()
    try:
        results([drill.silos[name].begin(1, (GOOD, OTHER)) for name in (GOOD, OTHER)])
        drill.service._steps._commits.dismiss(BAD)  # it may be in their round, and takes no step
        step(drill, 1, (GOOD, OTHER))
        step(drill, 2, (GOOD, OTHER))
    finally:
        stop.set()
        flood.join()
    assert_same(saved(drill, 1), expected)


@pytest.mark.parametrize(
    "steps",
    [
        pb.Steps(count=1, before=0, total=50_000),  # as if the run had hardly begun: everybody's rate is of it
        pb.Steps(count=1, before=5, total=6),
        pb.Steps(count=2, before=0, total=7),
    ],
    ids=["endless", "at its end", "no whole passes"],
)
def test_steps_that_are_no_part_of_whole_passes_are_refused(steps: pb.Steps, model: Path, tmp_path: Path) -> None:
    """With ``train.epochs`` the rate follows from the silo with most steps: who claims many has to make them."""
    drill = Drill(recipe_of(model, silos=NAMES, train={"epochs": 2, "rounds": 2}, gather=0.0), tmp_path)
    with pytest.raises(ProtocolError, match=r"bad has .* no even part of 2 passes") as caught:
        drill.silos[BAD].channel.call(pb.Begin(round=1, participants=NAMES, steps=steps))
    assert caught.value.remedy
    honest = pb.Steps(count=2, before=0, total=4)
    results([drill.silos[name].channel.submit(pb.Begin(round=1, participants=NAMES, steps=honest)) for name in NAMES])
    step(drill, 1, NAMES)
    drill.service.stop()
