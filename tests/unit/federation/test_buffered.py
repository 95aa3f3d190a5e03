"""The state machine of rounds that wait for nobody, driven by silos that are threads or plain calls."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import DiskFullError, FrameError, IsthmusError, ProtocolError, RoundLostError
from isthmus.federation.buffered import Buffered
from isthmus.federation.planner import RootPlanner
from isthmus.federation.rounds import Rounds
from isthmus.recipe import FederationSection
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.updates.compression import Compression
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.vitals import Vitals
from tests.conftest import make_recipe
from tests.unit.federation.test_rounds import BAD_TENSORS, LONG, SHAPES, SOON, WAIT, assert_plan, constant, update

Build = Callable[..., Buffered]


@pytest.fixture
def store(tmp_path: Path) -> RoleDirectory:
    return RoleDirectory(tmp_path)


@pytest.fixture
def build(store: RoleDirectory) -> Build:
    def buffered(
        *silos: str,
        buffer: int,
        staleness: int = 10,
        rounds: int = 9,
        minimum: int | None = None,
        patience: float = LONG,
        **federation: Any,
    ) -> Buffered:
        recipe = make_recipe(
            Path("none"),
            silos=silos,
            root={"patience": patience} | ({"minimum": minimum} if minimum else {}),
            train={"rounds": rounds, "evaluate": False},
            federation={"asynchronous": {"buffer": buffer, "staleness": staleness}, **federation},
        )
        return Buffered(recipe, RootPlanner(recipe, constant(0.0), store))

    return buffered


def plan(buffered: Buffered | Rounds, silo: str) -> Any:
    return buffered.ready(silo, pb.Ready()).result(WAIT)


def journal(store: RoleDirectory) -> list[dict[str, Any]]:
    return read_journal(store.path / "metrics.jsonl")


def test_the_fast_go_on_and_the_slow_still_counts(build: Build, store: RoleDirectory) -> None:
    buffered = build("a", "b", "slow", buffer=2, rounds=3)
    for silo in ("a", "slow", "b"):  # each at once
        assert_plan(plan(buffered, silo), 1, 0, [silo], 0.0)
    assert buffered.contribute("b", update(1, 3.0, weight=3)).result(WAIT) == pb.Accepted()
    early = buffered.ready("b", pb.Ready())
    assert not early.done()  # its update is in the buffer: it does not train on the same version again
    buffered.contribute("a", update(1, -1.0, weight=1))
    assert_plan(early.result(WAIT), 2, 1, ["b"], 2.0)
    assert_plan(plan(buffered, "a"), 2, 1, ["a"], 2.0)
    buffered.contribute("a", update(2, 1.0))
    buffered.contribute("slow", update(1, math.sqrt(2.0)))  # one version stale: as much as 1 from a fresh one
    for silo in ("a", "slow"):
        assert_plan(plan(buffered, silo), 3, 2, [silo], 3.0)
    buffered.contribute("b", update(2, 2 * math.sqrt(2.0), weight=1))
    buffered.contribute("slow", update(3, 0.0, weight=3))
    with pytest.raises(RoundLostError):  # what comes after the last version
        buffered.contribute("a", update(3))
    for silo in ("a", "b", "slow", "a"):
        assert_plan(plan(buffered, silo), 0, 3, [], 3.5)
    assert journal(store) == [
        {"round": 1, "weights": {"a": 1.0, "b": 3.0}, "staleness": {"a": 0, "b": 0}},
        {"round": 2, "weights": {"a": 1.0, "slow": 1.0}, "staleness": {"a": 0, "slow": 1}},
        {"round": 3, "weights": {"b": 1.0, "slow": 3.0}, "staleness": {"b": 1, "slow": 0}},
    ]
    assert store.rounds() == {1, 2, 3}


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_a_buffer_of_stale_updates_makes_a_smaller_step(build: Build, weights: str) -> None:
    """What a silo says it weighs does not make up for its age."""
    buffered = build("a", "b", "slow", buffer=1, weights=weights)
    plan(buffered, "slow")
    for number in (1, 2, 3):
        plan(buffered, "a")
        buffered.contribute("a", update(number, 0.0))
    buffered.contribute("slow", update(1, 1.0, weight=1.0 if weights == "equal" else 2e4))
    assert_plan(plan(buffered, "b"), 5, 4, ["b"], 0.5)


@pytest.mark.parametrize(
    "federation", [{}, {"weights": "equal", "optimizer": "adam"}, {"optimizer": {"kind": "momentum"}}], ids=str
)
def test_a_buffer_for_all_silos_is_a_round_of_all(
    build: Build, store: RoleDirectory, tmp_path: Path, federation: dict[str, Any]
) -> None:
    """To the last bit, with what server optimizers remember."""
    silos, elsewhere = ("a", "b", "c"), RoleDirectory(tmp_path / "rounds")
    recipe = make_recipe(Path("none"), silos=silos, train={"rounds": 3, "evaluate": False}, federation=federation)
    planner = RootPlanner(recipe, constant(0.0), elsewhere)
    rounds, buffered = Rounds(recipe, planner), build(*silos, buffer=3, rounds=3, **federation)
    draw = torch.Generator().manual_seed(1)
    for number in (1, 2, 3):
        for answer in [rounds.ready(silo, pb.Ready()) for silo in silos]:
            assert answer.result(WAIT).round == number  # type: ignore[attr-defined]
        for weight, silo in enumerate(draw_order(draw, silos), 1):
            tensors = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
            assert plan(buffered, silo).round == number
            for one in (rounds, buffered):
                one.contribute(silo, update(number, weight=weight / 4, tensors=tensors))
    for number in (1, 2, 3):
        expected, actual = elsewhere.load_round(number)["shared"], store.load_round(number)["shared"]
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    fresh = {"staleness": dict.fromkeys(silos, 0)}
    assert journal(store) == [line | fresh for line in journal(elsewhere)]


def draw_order(draw: torch.Generator, silos: tuple[str, ...]) -> list[str]:
    return [silos[place] for place in torch.randperm(len(silos), generator=draw).tolist()]


def test_an_update_that_began_too_long_ago_is_refused(build: Build, store: RoleDirectory) -> None:
    buffered = build("a", "slow", buffer=1, staleness=1)
    plan(buffered, "slow")
    for number in (1, 2):
        plan(buffered, "a")
        buffered.contribute("a", update(number))
    with pytest.raises(RoundLostError, match="slow began 2 versions ago, the recipe allows 1") as caught:
        buffered.contribute("slow", update(1))
    assert "federation.asynchronous.staleness" in caught.value.remedy
    with pytest.raises(RoundLostError):  # nor does it come in as a newer one
        buffered.contribute("slow", update(3))
    assert_plan(plan(buffered, "slow"), 3, 2, ["slow"], 2.0)
    buffered.contribute("slow", update(3))
    assert [line["staleness"] for line in journal(store)] == [{"a": 0}, {"a": 0}, {"slow": 0}]


def test_no_staleness_is_allowed(build: Build) -> None:
    buffered = build("a", "b", buffer=1, staleness=0)
    plan(buffered, "a"), plan(buffered, "b")
    buffered.contribute("a", update(1))
    with pytest.raises(RoundLostError):
        buffered.contribute("b", update(1))
    assert_plan(plan(buffered, "b"), 2, 1, ["b"], 1.0)


REFUSED: dict[str, tuple[str, Any, type[IsthmusError]]] = {
    "twice": ("a", update(1), ProtocolError),
    "no-plan": ("c", update(1), RoundLostError),
    "stranger": ("d", update(1), RoundLostError),
    "next-round": ("b", update(2), RoundLostError),
    "round-0": ("b", update(0), RoundLostError),
    "masked": ("b", pb.Update(round=1, learned=True, masked=b"x"), ProtocolError),
    "deal": ("b", pb.Deal(round=1), ProtocolError),
    "reveal": ("b", pb.Reveal(round=1), ProtocolError),
} | {
    f"tensors-{fault}": ("b", pb.Update(round=1, weight=1.0, tensors=tensors), FrameError)
    for fault, tensors in BAD_TENSORS.items()
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_update_changes_nothing(case: str, build: Build) -> None:
    peer, wrong, error = REFUSED[case]
    buffered = build("a", "b", "c", buffer=2)
    plan(buffered, "a"), plan(buffered, "b")
    buffered.contribute("a", update(1, 1.0))
    with pytest.raises(IsthmusError) as caught:
        buffered.contribute(peer, wrong)
    assert type(caught.value) is error
    assert caught.value.remedy
    buffered.contribute("b", update(1, 3.0))
    assert_plan(plan(buffered, "a"), 2, 1, ["a"], 2.0)


def test_a_stranger_gets_no_plan(build: Build) -> None:
    with pytest.raises(ProtocolError, match="stranger is no child of root"):
        build("a", buffer=1).ready("stranger", pb.Ready())


def test_an_update_is_taken_once(build: Build, store: RoleDirectory) -> None:
    """A replay counts neither in the version it was in nor in a later one."""
    buffered = build("a", "b", buffer=1)
    plan(buffered, "a")
    buffered.contribute("a", update(1))
    for replay in (update(1), update(2)):
        with pytest.raises(RoundLostError):
            buffered.contribute("a", replay)
    plan(buffered, "a")
    with pytest.raises(RoundLostError):
        buffered.contribute("a", update(1))
    assert len(journal(store)) == 1


def test_a_silo_that_comes_back_trains_on_the_newest(build: Build) -> None:
    """Its process is a new one: what the old one sent counts, what it had not sent is gone."""
    buffered = build("a", "b", buffer=1)
    plan(buffered, "b")
    plan(buffered, "a")
    buffered.contribute("a", update(1))
    assert_plan(plan(buffered, "b"), 2, 1, ["b"], 1.0)
    with pytest.raises(RoundLostError):
        buffered.contribute("b", update(1))
    buffered.contribute("b", update(2))
    assert_plan(plan(buffered, "a"), 3, 2, ["a"], 2.0)


def test_a_silo_that_dies_with_its_update_in_the_buffer(build: Build, store: RoleDirectory) -> None:
    buffered = build("a", "b", buffer=2)
    plan(buffered, "a"), plan(buffered, "b")
    buffered.contribute("a", update(1, 1.0))
    first, second = (buffered.ready("a", pb.Ready()) for _ in range(2))  # of two processes
    buffered.contribute("b", update(1, 3.0))
    assert_plan(second.result(WAIT), 2, 1, ["a"], 2.0)
    assert not first.done()
    assert journal(store)[0]["weights"] == {"a": 1.0, "b": 1.0}


def test_ended_early_the_buffer_is_dropped_and_all_that_ask_hear_it(build: Build, store: RoleDirectory) -> None:
    buffered = build("a", "b", "c", buffer=2, rounds=5)
    for silo in ("a", "b"):
        plan(buffered, silo)
    buffered.contribute("a", update(1)).result(WAIT)
    waiting = buffered.ready("a", pb.Ready())
    assert buffered.vitals() == Vitals("training", 0, gauges={"root_buffered_updates": 1})
    store.end_early()
    buffered.end_early()
    assert waiting.result(WAIT).round == 0
    with pytest.raises(RoundLostError):
        buffered.contribute("b", update(1))
    assert plan(buffered, "b").round == plan(buffered, "c").round == 0
    assert buffered.finished
    assert buffered.vitals() == Vitals("finished", 0, gauges={"root_buffered_updates": 0})


def test_silos_that_learn_nothing_end_the_federation_too(build: Build, store: RoleDirectory) -> None:
    buffered = build("a", "b", buffer=2, rounds=2)
    for number in (1, 2):
        for silo in ("a", "b"):
            plan(buffered, silo)
        for silo in ("a", "b"):
            buffered.contribute(silo, pb.Update(round=number, weight=0.0))
    assert_plan(plan(buffered, "a"), 0, 2, [], 0.0)
    assert [line["weights"] for line in journal(store)] == [{"a": 0.0, "b": 0.0}] * 2


def test_patience_ends_with_enough(build: Build, store: RoleDirectory) -> None:
    buffered = build("a", "b", buffer=2, minimum=1, patience=SOON)
    for number in (1, 2):
        assert_plan(plan(buffered, "a"), number, number - 1, ["a"], number - 1.0)
        buffered.contribute("a", update(number))
    assert plan(buffered, "a").round == 3
    assert [list(line["weights"]) for line in journal(store)] == [["a"], ["a"]]


def test_a_lost_quorum_is_waited_for(build: Build, store: RoleDirectory, caplog: pytest.LogCaptureFixture) -> None:
    buffered = build("a", "b", "c", buffer=3, minimum=2, patience=SOON)
    for silo in "abc":
        plan(buffered, silo)
    time.sleep(4 * SOON)  # nobody has contributed: the clock stands
    assert not caplog.records
    buffered.contribute("a", update(1))
    waiting = buffered.ready("a", pb.Ready())
    time.sleep(4 * SOON)
    assert not waiting.done()
    assert "1 updates came in 0.05 seconds, a version takes 2; waiting; missing: b, c" in caplog.text
    assert plan(buffered, "b").round == 1  # it came back
    buffered.contribute("b", update(1))
    assert_plan(waiting.result(WAIT), 2, 1, ["a"], 1.0)
    for silo in "bc":
        plan(buffered, silo)
    for silo in "abc":  # with all there again, the buffer is filled
        assert store.last_round() == 1
        buffered.contribute(silo, update(2))
    assert store.last_round() == 2


def test_patience_that_ends_just_as_the_buffer_is_full(build: Build) -> None:
    """Its timer runs only after the version is out."""
    buffered = build("a", "b", buffer=2)
    plan(buffered, "a"), plan(buffered, "b")
    buffered.contribute("a", update(1))
    buffered.contribute("b", update(1))
    plan(buffered, "a")
    buffered.contribute("a", update(2))
    buffered._lose_patience(0)
    plan(buffered, "b")
    buffered.contribute("b", update(2, 3.0))
    assert_plan(plan(buffered, "b"), 3, 2, ["b"], 3.0)


def test_a_root_that_starts_again_has_the_last_version_and_an_empty_buffer(build: Build, store: RoleDirectory) -> None:
    buffered = build("a", "b", "c", buffer=2, optimizer="momentum")
    for silo in "abc":
        plan(buffered, silo)
    for silo in "ab":
        buffered.contribute(silo, update(1))
    first = plan(buffered, "a")
    buffered.contribute("a", update(2))
    resumed = build("a", "b", "c", buffer=2, optimizer="momentum")
    for silo, late in (("a", 2), ("b", 2), ("c", 1)):  # sent again, or trained for the root that is gone
        with pytest.raises(RoundLostError):
            resumed.contribute(silo, update(late))
    assert plan(resumed, "a") == first
    plan(resumed, "c")
    for silo in "ac":
        resumed.contribute(silo, update(2))
    assert_plan(plan(resumed, "b"), 3, 2, ["b"], 2.9)  # momentum goes on
    assert [line["staleness"] for line in journal(store)] == [{"a": 0, "b": 0}, {"a": 0, "c": 0}]


def test_full_disk(build: Build, store: RoleDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    buffered = build("a", "b", buffer=2)
    plan(buffered, "a"), plan(buffered, "b")

    def full(*_: object) -> None:
        raise DiskFullError("no room", remedy="free some space")

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_round", full)
        buffered.contribute("a", update(1))
        waiting = buffered.ready("a", pb.Ready())
        buffered.contribute("b", update(1))
    for answer in (waiting, buffered.ready("b", pb.Ready())):
        with pytest.raises(DiskFullError, match="no room"):
            answer.result(WAIT)
    assert store.rounds() == set()
    assert_plan(plan(build("a", "b", buffer=2), "a"), 1, 0, ["a"], 0.0)


@pytest.mark.parametrize("compression", [{"kind": "top-k", "keep": 0.4}, {"bits": 16}], ids=str)
def test_smaller_updates(build: Build, compression: dict[str, Any]) -> None:
    size = sum(math.prod(shape) for shape in SHAPES.values())
    compressor = Compression(FederationSection.model_validate({"compression": compression})).compressor(size, 1)
    assert compressor is not None
    row_P = torch.zeros(size)
    row_P[0] = 2.0
    buffered = build("a", "b", buffer=1, compression=compression)
    plan(buffered, "a"), plan(buffered, "b")
    buffered.contribute("b", pb.Update(round=1, weight=1.0, compressed=compressor.encode(torch.zeros(size))))
    for wrong in (b"", b"x" * 40):
        with pytest.raises(FrameError):
            buffered.contribute("a", pb.Update(round=1, weight=1.0, compressed=wrong))
    buffered.contribute("a", pb.Update(round=1, weight=1.0, compressed=compressor.encode(row_P)))
    shared = buffered._planner.shared
    assert float(shared["x"][0, 0]) == pytest.approx(math.sqrt(2.0))
    assert sum(float(tensor.abs().sum()) for tensor in shared.values()) == pytest.approx(math.sqrt(2.0))


def test_many_silos_at_once(build: Build, store: RoleDirectory) -> None:
    """Every accepted update is in one version, none twice, and its staleness is what passed since its plan."""
    names = [f"silo-{number:02d}" for number in range(16)]
    buffered = build(*names, buffer=5, rounds=40, staleness=2)
    start = threading.Barrier(len(names))

    def silo(name: str) -> tuple[int, int]:
        start.wait(WAIT)
        accepted = refused = 0
        while (given := plan(buffered, name)).round:
            time.sleep(int(name[-2:]) * 2e-3)
            try:
                buffered.contribute(name, update(given.round, 0.0))
                accepted += 1
            except RoundLostError:
                refused += 1
        return accepted, refused

    with ThreadPoolExecutor(len(names)) as threads:
        counts = list(threads.map(silo, names, timeout=WAIT))
    lines = journal(store)
    assert [line["round"] for line in lines] == list(range(1, 41))
    assert all(len(line["weights"]) == 5 and line["staleness"].keys() == line["weights"].keys() for line in lines)
    assert all(age <= 2 for line in lines for age in line["staleness"].values())
    assert sum(accepted for accepted, _ in counts) == 200
    assert max(age for line in lines for age in line["staleness"].values()) > 0


def test_current_adapters_are_given_without_a_plan(build: Build) -> None:
    buffered = build("a", buffer=1, rounds=1)
    plan(buffered, "a")
    assert not buffered.finished
    buffered.contribute("a", update(1, 2.0))
    current: Any = buffered.handle("b", pb.Current()).result(WAIT)
    assert (current.completed, buffered.finished) == (1, True)
    tensors = codec.decode_named(current.adapters, SHAPES)
    assert all(torch.equal(one, torch.full(SHAPES[name], 2.0)) for name, one in tensors.items())
