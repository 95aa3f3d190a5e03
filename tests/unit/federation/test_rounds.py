"""The state machine of the rounds, driven by silos that are threads or plain calls."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import DiskFullError, FrameError, IsthmusError, ProtocolError, QuorumError, RoundLostError
from isthmus.federation.planner import RootPlanner
from isthmus.federation.rounds import Phase, Rounds
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.patience import Heard
from isthmus.wire.vitals import Vitals
from tests.conftest import make_recipe

SHAPES = {"x": (2, 3), "y": (4,)}
SOON, LONG, WAIT = 0.05, 600.0, 60.0
Tensors = dict[str, torch.Tensor]
Build = Callable[..., Rounds]


@pytest.fixture
def store(tmp_path: Path) -> RoleDirectory:
    return RoleDirectory(tmp_path)


@pytest.fixture
def build(store: RoleDirectory) -> Build:
    def rounds(
        *silos: str, rounds: int = 2, minimum: int | None = None, patience: float = LONG, **federation: Any
    ) -> Rounds:
        sections = {
            "root": {"patience": patience} | ({"minimum": minimum} if minimum else {}),
            "train": {"rounds": rounds, "evaluate": False},
            "federation": federation,
        }
        recipe = make_recipe(Path("none"), silos=silos, **sections)
        return Rounds(recipe, RootPlanner(recipe, constant(0.0), store))

    return rounds


def constant(value: float) -> Tensors:
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


def update(round: int, value: float = 1.0, weight: float = 1.0, tensors: Tensors | None = None) -> pb.Update:
    named = codec.encode_named(constant(value) if tensors is None else tensors)
    return pb.Update(round=round, weight=weight, tensors=named)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def shared(plan: Any) -> Tensors:
    return codec.decode_named(plan.adapters, SHAPES)


def assert_plan(plan: Any, round: int, completed: int, participants: list[str], value: float) -> None:
    assert (plan.round, plan.completed, list(plan.participants)) == (round, completed, participants)
    for name, tensor in shared(plan).items():
        assert torch.equal(tensor, torch.full(SHAPES[name], value))


def plans(rounds: Rounds, *silos: str) -> list[Any]:
    """All ask, then all are answered."""
    answers = [rounds.ready(silo, pb.Ready()) for silo in silos]
    return [answer.result(WAIT) for answer in answers]


def test_round_by_round(build: Build, store: RoleDirectory) -> None:
    rounds = build("b", "a")
    first = rounds.ready("b", pb.Ready())
    assert not first.done()
    for plan in (*plans(rounds, "a"), first.result(WAIT)):
        assert_plan(plan, 1, 0, ["a", "b"], 0.0)
    assert rounds.contribute("b", update(1, 2.0, weight=3)).result(WAIT) == pb.Accepted()
    early = rounds.ready("b", pb.Ready())
    assert not early.done()
    rounds.contribute("a", update(1, -2.0, weight=1))
    assert not early.done()
    for plan in (*plans(rounds, "a"), early.result(WAIT)):
        assert_plan(plan, 2, 1, ["a", "b"], 1.0)
    rounds.contribute("a", update(2, 0.25))
    rounds.contribute("b", update(2, 0.75))
    with pytest.raises(ProtocolError, match="stranger is no child of root"):
        rounds.ready("stranger", pb.Ready())
    for plan in plans(rounds, "a", "b", "a"):  # each at once
        assert_plan(plan, 0, 2, [], 1.5)
    assert store.last_round() == 2
    lines = read_journal(store.path / "metrics.jsonl")
    assert lines == [{"round": 1, "weights": {"a": 1.0, "b": 3.0}}, {"round": 2, "weights": {"a": 1.0, "b": 1.0}}]


def test_held_between_two_rounds_nobody_is_answered_and_nothing_is_lost(build: Build, store: RoleDirectory) -> None:
    rounds = build("a", "b")
    first = plans(rounds, "a", "b")
    held = rounds.hold()
    assert held is rounds.hold()
    assert not held.done()  # a round is under way
    for silo in "ab":
        rounds.contribute(silo, update(1))
    waiting = [rounds.ready(silo, pb.Ready(completed=1)) for silo in "ab"]
    until(held.done)
    assert first
    assert not any(answer.done() for answer in waiting)
    assert store.rounds()
    again = build("a", "b")  # the next process goes on after that round
    assert_plan(plans(again, "a", "b")[0], 2, 1, ["a", "b"], 1.0)


@pytest.mark.parametrize("contributed", [(), ("a",), ("a", "b")])
def test_ended_early_the_round_under_way_is_dropped_and_all_that_ask_hear_it(
    contributed: tuple[str, ...], build: Build, store: RoleDirectory
) -> None:
    rounds = build("a", "b", rounds=5)
    plans(rounds, "a", "b")
    for silo in contributed:
        rounds.contribute(silo, update(1, 2.0)).result(WAIT)
    saved = int(contributed == ("a", "b"))
    waiting = [rounds.ready(silo, pb.Ready()) for silo in contributed[:1]]
    store.end_early()
    rounds.end_early()
    for plan in [answer.result(WAIT) for answer in waiting] + plans(rounds, "b"):
        assert (plan.round, plan.completed) == (0, saved)
    if not saved:
        with pytest.raises(RoundLostError):
            rounds.contribute("b", update(1))
    assert plans(rounds, "a")[0].round == 0
    assert rounds.finished
    assert store.last_round() == saved
    rounds.end_early()
    assert rounds.vitals().state == "finished"

    store.go_on()
    again = build("a", "b", rounds=5)
    for plan in plans(again, "a", "b"):
        assert_plan(plan, saved + 1, saved, ["a", "b"], 2.0 * saved)


def test_ended_early_whoever_waits_for_others_is_answered(build: Build, store: RoleDirectory) -> None:
    rounds = build("a", "b", minimum=2, patience=SOON)
    waiting = rounds.ready("a", pb.Ready())
    until(lambda: rounds.phase is Phase.WAITING)
    store.end_early()
    rounds.end_early()
    assert waiting.result(WAIT).round == 0


def test_it_says_whom_it_waits_for(build: Build) -> None:
    rounds = build("a", "b", rounds=1)
    assert rounds.vitals() == Vitals("gathering", 0, missing=("a", "b"))
    first = rounds.ready("b", pb.Ready())
    assert rounds.vitals().missing == ("a",)
    plans(rounds, "a")
    first.result(WAIT)
    rounds.contribute("a", update(1)).result(WAIT)
    assert rounds.vitals() == Vitals("training", 0, missing=("b",))
    rounds.contribute("b", update(1)).result(WAIT)
    assert rounds.vitals().completed == 1
    plans(rounds, "a")
    assert rounds.vitals() == Vitals("finished", 1)


def test_before_the_first_round_it_is_held_at_once(build: Build) -> None:
    assert build("a", "b").hold().done()


def test_a_round_goes_on_with_a_silo_that_has_nothing(build: Build, store: RoleDirectory) -> None:
    rounds = build("b", "a")
    plans(rounds, "a", "b")
    rounds.contribute("a", pb.Update(round=1, weight=0.0))
    rounds.contribute("b", update(1, 2.0, weight=3))
    for plan in plans(rounds, "a", "b"):
        assert_plan(plan, 2, 1, ["a", "b"], 2.0)
    for silo in ("a", "b"):
        rounds.contribute(silo, pb.Update(round=2, weight=0.0))
    for plan in plans(rounds, "a", "b"):
        assert_plan(plan, 0, 2, [], 2.0)
    assert [line["weights"] for line in read_journal(store.path / "metrics.jsonl")] == [
        {"a": 0.0, "b": 3.0},
        {"a": 0.0, "b": 0.0},
    ]


BAD_TENSORS = {
    "missing": [pb.Tensor(name="x", shape=(2, 3), data=bytes(24))],
    "nothing": [],
    "foreign": codec.encode_named(constant(1.0) | {"z": torch.ones(1)}),
    "twice": codec.encode_named(constant(1.0)) * 2,
    "shape": codec.encode_named(constant(1.0) | {"x": torch.ones(3, 2)}),
    "few-bytes": [pb.Tensor(name="x", shape=(2, 3), data=bytes(23)), *codec.encode_named({"y": torch.ones(4)})],
    "nan": codec.encode_named(constant(float("nan"))),
    "infinity": codec.encode_named(constant(float("-inf"))),
}
REFUSED: dict[str, tuple[str, pb.Update, type[IsthmusError]]] = {
    "twice": ("a", update(1), ProtocolError),
    "stranger": ("c", update(1), ProtocolError),
    "next-round": ("b", update(2), RoundLostError),
    "round-0": ("b", update(0), RoundLostError),
} | {
    f"tensors-{fault}": ("b", pb.Update(round=1, weight=1.0, tensors=tensors), FrameError)
    for fault, tensors in BAD_TENSORS.items()
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_update_changes_nothing(case: str, build: Build) -> None:
    peer, wrong, error = REFUSED[case]
    rounds = build("a", "b")
    plans(rounds, "a", "b")
    rounds.contribute("a", update(1, 1.0))
    with pytest.raises(IsthmusError) as caught:
        rounds.contribute(peer, wrong)
    assert type(caught.value) is error
    assert caught.value.remedy
    rounds.contribute("b", update(1, 3.0))
    for plan in plans(rounds, "a", "b"):
        assert_plan(plan, 2, 1, ["a", "b"], 2.0)


def test_update_without_a_round(build: Build) -> None:
    rounds = build("a", "b", rounds=1)
    with pytest.raises(RoundLostError):
        rounds.contribute("a", update(1))
    plans(rounds, "a", "b")
    for silo in ("a", "b"):
        rounds.contribute(silo, update(1))
    with pytest.raises(RoundLostError):
        rounds.contribute("a", update(1))
    assert_plan(plans(rounds, "a")[0], 0, 1, [], 1.0)


def test_quorum_goes_on_without_the_missing(build: Build) -> None:
    rounds = build("a", "b", minimum=1, patience=SOON)
    for number in (1, 2):
        assert_plan(plans(rounds, "a")[0], number, number - 1, ["a"], number - 1.0)
        rounds.contribute("a", update(number))
    assert plans(rounds, "a")[0].round == 0


def test_silent_silo_comes_again(build: Build) -> None:
    rounds = build("a", "b", rounds=3, minimum=1, patience=1.0)
    plans(rounds, "a", "b")
    rounds.contribute("a", update(1))
    assert_plan(plans(rounds, "a")[0], 2, 1, ["a"], 1.0)  # patience with b ended, and nobody waits for it now
    with pytest.raises(ProtocolError):
        rounds.contribute("b", update(2))
    back = rounds.ready("b", pb.Ready())
    rounds.contribute("a", update(2))
    for plan in (*plans(rounds, "a"), back.result(WAIT)):
        assert_plan(plan, 3, 2, ["a", "b"], 2.0)


@pytest.mark.parametrize("when", ["gathering", "training"])
def test_a_lost_quorum_is_waited_for(
    build: Build, store: RoleDirectory, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "isthmus")
    rounds = build("a", "b", patience=10 * SOON)
    if when == "training":
        plans(rounds, "a", "b")
        rounds.contribute("a", update(1))
    waiting = rounds.ready("a", pb.Ready())
    until(lambda: "1 silos are left, the recipe needs 2; waiting; missing: b" in caplog.text)
    assert not waiting.done()
    assert rounds.phase is Phase.WAITING
    with pytest.raises(RoundLostError):
        rounds.contribute("b", update(1))
    assert store.last_round() == 0
    back = rounds.ready("b", pb.Ready())
    for plan in (waiting.result(WAIT), back.result(WAIT)):
        assert_plan(plan, 1, 0, ["a", "b"], 0.0)
    for number in (1, 2):
        for silo in ("a", "b"):
            rounds.contribute(silo, update(number))
        plans(rounds, "a", "b")
    messages = [record.getMessage() for record in caplog.records]
    assert "root: round 1 begins with a, b; missing: nobody" in messages
    assert "root: round 2: a, b contributed" in messages
    assert messages[-1] == "root: finished after 2 rounds"


def test_of_three_enough_are_two_and_the_third_is_not_waited_for(build: Build) -> None:
    rounds = build("a", "b", "c", minimum=2, patience=SOON)
    waiting = rounds.ready("a", pb.Ready())
    until(lambda: rounds.phase is Phase.WAITING)
    assert_plan(rounds.ready("b", pb.Ready()).result(WAIT), 1, 0, ["a", "b"], 0.0)
    assert waiting.done()


def test_a_root_that_hears_nobody_loses_nobody(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network is broken for longer than its patience."""
    cut_off, looks = [True], list[set[str]]()

    def silent(self: Heard, peers: Any) -> bool:
        looks.append(set(peers))
        return cut_off[0]

    monkeypatch.setattr(Heard, "silent", silent)
    rounds = build("a", "b", minimum=1, patience=SOON)
    first = rounds.ready("a", pb.Ready())
    until(lambda: len(looks) > 1)
    second = rounds.ready("b", pb.Ready())
    assert_plan(first.result(WAIT), 1, 0, ["a", "b"], 0.0)
    second.result(WAIT)
    rounds.contribute("a", update(1, 1.0)).result(WAIT)
    looks.clear()
    until(lambda: len(looks) > 1)
    assert looks[0] == {"a"}
    rounds.contribute("b", update(1, 3.0)).result(WAIT)
    assert plans(rounds, "a", "b")[0].completed == 1
    rounds.contribute("a", update(2, 1.0)).result(WAIT)
    cut_off[0] = False
    assert plans(rounds, "a")[0].completed == 2, "b alone is away"


def test_resume(build: Build) -> None:
    rounds = build("a", "b", rounds=3)
    for _ in range(2):
        number = plans(rounds, "a", "b")[0].round
        draw = torch.Generator().manual_seed(number)
        for silo in ("a", "b"):
            tensors = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
            rounds.contribute(silo, update(number, weight=number, tensors=tensors))
    expected = plans(rounds, "a", "b")[0]
    assert (expected.round, expected.completed) == (3, 2)
    resumed = build("a", "b", rounds=3)
    assert plans(resumed, "a", "b") == [expected, expected]
    for silo in ("a", "b"):
        resumed.contribute(silo, update(3))
    finished = plans(resumed, "a")[0]
    assert finished.round == 0
    assert plans(build("a", "b", rounds=3), "b") == [finished]


@pytest.mark.parametrize("minimum", [1, 2])
def test_full_disk(build: Build, store: RoleDirectory, monkeypatch: pytest.MonkeyPatch, minimum: int) -> None:
    rounds = build("a", "b", minimum=minimum)
    plans(rounds, "a", "b")
    for silo in ("a", "b"):
        rounds.contribute(silo, update(1))
    plans(rounds, "a", "b")

    def full(*_: object) -> None:
        raise DiskFullError("no room", remedy="free some space")

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_round", full)
        rounds.contribute("a", update(2))
        waiting = rounds.ready("a", pb.Ready())
        rounds.contribute("b", update(2))
    for answer in (waiting, rounds.ready("b", pb.Ready()), rounds.ready("a", pb.Ready())):
        with pytest.raises(DiskFullError, match="no room"):
            answer.result(WAIT)
    assert store.rounds() == {1}
    assert_plan(plans(build("a", "b"), "a", "b")[0], 2, 1, ["a", "b"], 1.0)


def test_restarted_silo_is_not_waited_for(build: Build) -> None:
    """A participant that asks again is a new process: its round goes on without it, and the next one with it."""
    rounds = build("a", "b", minimum=1)
    plans(rounds, "a", "b")
    back = rounds.ready("b", pb.Ready())
    with pytest.raises(ProtocolError):
        rounds.contribute("b", update(1))
    rounds.contribute("a", update(1))
    for plan in (*plans(rounds, "a"), back.result(WAIT)):
        assert_plan(plan, 2, 1, ["a", "b"], 1.0)


@pytest.mark.parametrize("silos", [("a",), ("a", "b")])
def test_all_restarted_begin_the_round_again(build: Build, silos: tuple[str, ...]) -> None:
    rounds = build(*silos)
    for _ in range(3):
        for plan in plans(rounds, *silos):
            assert_plan(plan, 1, 0, list(silos), 0.0)
    for silo in silos:
        rounds.contribute(silo, update(1))
    assert_plan(plans(rounds, *silos)[0], 2, 1, list(silos), 1.0)


def test_the_first_plan_has_what_every_silo_starts_with(store: RoleDirectory) -> None:
    recipe = make_recipe(Path("none"), silos=("a",), train={"rounds": 1, "evaluate": False})
    rounds = Rounds(recipe, RootPlanner(recipe, constant(0.5), store))
    assert_plan(rounds.ready("a", pb.Ready()).result(WAIT), 1, 0, ["a"], 0.5)
    rounds.contribute("a", update(1, 2.0))
    assert_plan(rounds.ready("a", pb.Ready()).result(WAIT), 0, 1, [], 2.5)


def test_patience_that_ends_just_as_the_last_one_comes(build: Build) -> None:
    """Its timer has taken those who were there, and runs only after the phase is over."""
    rounds = build("a", "b", minimum=1)
    gathering = rounds._gathering
    plans(rounds, "a", "b")
    gathering._fire({"a": None})
    updates = rounds._collection._barrier  # type: ignore[union-attr]
    rounds.contribute("a", update(1, 1.0))
    rounds.contribute("b", update(1, 3.0))
    updates._fire({"a": None})
    for plan in plans(rounds, "a", "b"):
        assert_plan(plan, 2, 1, ["a", "b"], 2.0)


def test_many_silos_at_once(build: Build, store: RoleDirectory) -> None:
    names = [f"silo-{number:02d}" for number in range(20)]
    rounds = build(*names, rounds=5)
    start = threading.Barrier(len(names))

    def silo(name: str) -> list[tuple[int, float]]:
        start.wait(WAIT)
        seen = []
        while (plan := rounds.ready(name, pb.Ready()).result(WAIT)).round:
            assert list(plan.participants) == names
            seen.append((plan.round, float(shared(plan)["x"][0, 0])))
            rounds.contribute(name, update(plan.round, float(name[-2:])))
        return seen

    with ThreadPoolExecutor(len(names)) as threads:
        histories = list(threads.map(silo, names, timeout=WAIT))
    assert histories == [[(number, 9.5 * (number - 1)) for number in range(1, 6)]] * len(names)
    assert store.rounds() == {1, 2, 3, 4, 5}


def far_after_two_rounds(rounds: Rounds) -> float:
    """How far from 2 anything shared is at most, where four silos of five add about 1 a round and one goes wild."""
    for number in (1, 2):
        plans(rounds, *"abcde")
        for silo, value in zip("abcd", (0.9, 1.0, 1.0, 1.1), strict=True):
            rounds.contribute(silo, update(number, value))
        rounds.contribute("e", update(number, -1e6, weight=2e4))
    return max(float((tensor - 2).abs().max()) for tensor in shared(plans(rounds, "a")[0]).values())


@pytest.mark.parametrize(
    "federation",
    [{"robust": rule} for rule in ("median", "trimmed-mean", "krum", "geometric-median", "centered-clipping")]
    + [{"robust": {"mix": True, "rule": "trimmed-mean"}}, {"robust": {"rule": "fltrust", "trusted": "b"}}],
    ids=str,
)
def test_a_wild_silo_is_not_followed(build: Build, federation: dict[str, Any]) -> None:
    assert far_after_two_rounds(build(*"abcde", **federation)) <= 0.3


def test_the_mean_follows_a_wild_silo(build: Build) -> None:
    assert far_after_two_rounds(build(*"abcde")) > 1e5


def test_a_round_that_has_too_few_for_its_rule_ends_the_federation(build: Build, store: RoleDirectory) -> None:
    """Silos that learned nothing are there, but not to compare the others to; what was learned before is kept."""
    rounds = build(*"abc", robust="median")
    plans(rounds, *"abc")
    for silo in "abc":
        rounds.contribute(silo, update(1))
    plans(rounds, *"abc")
    rounds.contribute("b", update(2, weight=0.0))
    waiting = rounds.ready("b", pb.Ready())
    for silo, weight in zip("ac", (1.0, 0.0), strict=True):
        rounds.contribute(silo, update(2, weight=weight))
    for answer in (waiting, rounds.ready("a", pb.Ready()), rounds.ready("c", pb.Ready())):
        with pytest.raises(QuorumError, match="1 silos learned something, the rule 'median' needs 3"):
            answer.result(WAIT)
    assert store.last_round() == 1
    assert_plan(plans(build(*"abc", robust="median"), *"abc")[0], 2, 1, ["a", "b", "c"], 1.0)


def test_centered_clipping_goes_on_from_what_it_remembers(build: Build, store: RoleDirectory) -> None:
    rounds = build(*"abc", robust="centered-clipping")
    plans(rounds, *"abc")
    for silo, value in zip("abc", (1.0, 2.0, 9.0), strict=True):
        rounds.contribute(silo, update(1, value))
    reference_P = store.load_round(1)["sharing"]["B"]["rule"]["reference"]
    expected = {name: tensor.flatten()[0] for name, tensor in shared(plans(rounds, *"abc")[0]).items()}
    assert float(reference_P[0]) == pytest.approx(float(expected["x"]))
    resumed = build(*"abc", robust="centered-clipping")._planner
    assert isinstance(resumed, RootPlanner)
    assert torch.equal(resumed._sharing.state_dict()["B"]["rule"]["reference"], reference_P)


def test_current_adapters_are_given_at_any_time(build: Build) -> None:
    rounds = build("a", rounds=1)
    assert not rounds.finished
    plans(rounds, "a")
    assert rounds.handle("a", pb.Current()).result(WAIT).completed == 0  # type: ignore[attr-defined]
    rounds.contribute("a", update(1, 2.0))
    current: Any = rounds.handle("a", pb.Current()).result(WAIT)
    assert current.completed == 1
    assert all(torch.equal(one, torch.full(SHAPES[name], 2.0)) for name, one in shared(current).items())
    plans(rounds, "a")
    assert rounds.finished
