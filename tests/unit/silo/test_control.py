"""SCAFFOLD's controls from round to round: c is the mean of the silos' own, whatever noise, masks, losses and stops do;
and keys that ask for nothing change nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.data.tokens import batches, collate
from isthmus.engines.certificates import make_certificates
from isthmus.errors import FrameError, ProtocolError, RoundLostError
from isthmus.federation.aggregator import root_service
from isthmus.federation.collection import Collected
from isthmus.federation.contribution import Contribution
from isthmus.federation.control import RootControl
from isthmus.federation.planner import shared_tensors
from isthmus.model import adapters
from isthmus.model.optim import build_optimizer
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.silo.control import SiloControl
from isthmus.silo.join import join, load_data
from isthmus.silo.trainer import train_step
from isthmus.silo.worker import Worker
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.updates.flat import Layout
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model, write_rows
from tests.oracle.twins import Tensors, assert_same, distance, loopback

NAMES = ("a", "b", "c")
ROUNDS, STEPS, BATCH = 4, 2, 3
WAIT = 120.0
SCAFFOLD = {"control": "scaffold", "weights": "equal"}


class Losing(LoopbackChannel):
    """A way to the root on which the update of one round is lost, or the answer to it."""

    loses = 0
    late = False

    def submit(self, request: Message) -> Answer:
        if isinstance(request, pb.Update) and request.round == self.loses:
            self.loses = 0
            if self.late:
                super().submit(request).result(WAIT)
            raise RoundLostError("gone on its way", remedy="ask for the next plan")
        return super().submit(request)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


Build = Callable[..., Recipe]


@pytest.fixture
def build(folder: Path, tmp_path: Path) -> Build:
    """A recipe of silos with rows of their own."""

    def recipe(names: Iterable[str] = NAMES, rounds: int = ROUNDS, **sections: Any) -> Recipe:
        silos = []
        for place, name in enumerate(names):
            rows = [{"text": f"w{4 + row} w{30 + row}", "reply": f"w{60 + 7 * place + row % 3}"} for row in range(6)]
            silos.append({"name": name, "train": str(write_rows(tmp_path / f"{name}.jsonl", rows))})
        train = {"rounds": rounds, "steps": STEPS, "batch": BATCH, "optimizer": "sgd", "learning_rate": 0.02}
        values = {"silo": silos, "task": {"prompt": "{text}", "answer": " {reply}"}, **sections}
        values["train"] = train | {"evaluate": False} | sections.get("train", {})
        values["trunk"] = {"together": 1, **sections.get("trunk", {})}  # what shares a pass changes last bits
        values["wire"] = {"certificates": str(tmp_path / "certificates")}
        return make_recipe(folder, **values)

    return recipe


def federate(
    recipe: Recipe, run: RunDirectory, names: Iterable[str] = NAMES, *, loses: int = 0, late: bool = False
) -> None:
    """All roles, from the last round on disk to the recipe's last; of the last silo the update of a round is lost."""
    trunk, root, names = TrunkService(recipe, run.role("trunk")), root_service(recipe, run.role("root")), list(names)
    trunk.restore(run.completed())

    def work(name: str) -> None:
        way = Losing(root, name)
        way.loses, way.late = (loses, late) if name == names[-1] else (0, False)
        worker = Worker(recipe, name, run.role(name), trunk=loopback(trunk, name, recipe), root=way)
        worker.run()
        worker.close()

    with ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(work, names, timeout=WAIT))
    trunk.stop()


def run_of(recipe: Recipe, path: Path, **how: Any) -> RunDirectory:
    run = RunDirectory.create(path, recipe)
    federate(recipe, run, [silo.name for silo in recipe.silo], **how)
    return run


def shared_of(run: RunDirectory, number: int = ROUNDS) -> Tensors:
    shared: Tensors = run.role("root").load_round(number)["shared"]
    return shared


def settled(run: RunDirectory, name: str, number: int = ROUNDS) -> Tensors:
    """A silo's own control after a round, as its next plan would have it."""
    counted = run.role("root").load_round(number)["control"]["counted"].get(name, 0)
    known = max(one for one in run.role(name).rounds() if one <= number)
    control = SiloControl(run.recipe(), name)
    control.load_state_dict(run.role(name).load_round(known)["control"])
    control.begin(pb.Plan(counted={name: counted}), {})
    return control._own


def assert_c_is_the_mean(run: RunDirectory, number: int = ROUNDS, tolerance: float = 1e-5) -> None:
    c = run.role("root").load_round(number)["control"]["mean"]
    own = [settled(run, name, number) for name in NAMES]
    mean = {name: torch.stack([one.get(name, torch.zeros_like(c[name])) for one in own]).mean(0) for name in c}
    assert max(float(tensor.abs().max()) for tensor in c.values()) > 1e-4
    assert max(distance(one[name], mean[name]) for one in own if one for name in c) > 0.1  # the silos differ
    assert_same(c, mean, tolerance)


def initial_of(run: RunDirectory) -> Tensors:
    return shared_tensors(run.recipe())


def between(one: Tensors, other: Tensors) -> float:
    """The L2 norm of the difference of all tensors together."""
    return float(torch.cat([(one[name] - other[name]).double().flatten() for name in one]).norm())


NOISED = {"update": {"clip": 0.02, "noise": 1e-3}}
HOW: dict[str, dict[str, Any]] = {
    "open": {},
    "noised": {"boundary": NOISED},
    "alternating": {"federation": {"lora": "alternating"}},
    "momentum at the root": {"federation": {"optimizer": "momentum"}},
    "normalized": {"federation": {"normalized": True}},
    "masked": {"federation": {"secure": True}},
    "masked, noised": {"federation": {"secure": True}, "boundary": NOISED},
}


@pytest.mark.parametrize("how", HOW)
def test_c_is_the_mean_of_the_silos_own(build: Build, tmp_path: Path, how: str) -> None:
    sections = {**HOW[how], "federation": {**SCAFFOLD, **HOW[how].get("federation", {})}}
    recipe = build(**sections)
    if recipe.federation.secure.masks:
        make_certificates(recipe, tmp_path / "certificates")
    run = run_of(recipe, tmp_path / "run")
    for number in range(1, ROUNDS + 1):
        assert_c_is_the_mean(run, number)


@pytest.mark.parametrize("how", ["open", "alternating", "momentum at the root", "normalized"])
def test_honest_rounds_control_is_accepted_under_the_tightest_bound(build: Build, tmp_path: Path, how: str) -> None:
    """The bound is the longest change that these very rounds made."""
    federation = {**SCAFFOLD, **HOW[how].get("federation", {})}
    free = run_of(build(federation=federation), tmp_path / "free")
    begun = [initial_of(free), *(shared_of(free, number) for number in range(1, ROUNDS + 1))]
    most = max(between(one, other) for one, other in itertools.pairwise(begun))
    bounded = run_of(build(federation={**federation, "max_change": most * 1.00001}), tmp_path / "bounded")
    assert_same(shared_of(bounded), shared_of(free), 0.0)


def test_honest_means_never_reach_beyond_the_bound(build: Build) -> None:
    """Rounds of any silos, whose mean updates are as long as may be: c is as long as may be, and no longer."""
    recipe, layout, draw = build(federation=SCAFFOLD), Layout({"x": (3,)}), torch.Generator().manual_seed(1)
    for most in (1e-3, 1.0, 1e3):
        root, silo, norms = RootControl(recipe), SiloControl(recipe, "a", most), []
        for round in range(1, 200):
            plan = pb.Plan(round=round)
            root.add_to(plan, layout)
            silo.begin(plan, {"x": torch.zeros(3)})
            norms.append(float(silo._mean["x"].norm()))
            way = torch.randn(3, generator=draw) if round < 100 else torch.tensor([1.0, 0.0, 0.0])
            change = {"x": most * way / way.norm()}
            names = NAMES[: int(torch.randint(1, 4, (), generator=draw))]
            found = tuple(Contribution(name, 1.0, change) for name in names)
            root.follow(round, Collected(dict.fromkeys(names, 1.0), found), layout)
        assert norms[0] == 0
        assert max(norms) == pytest.approx(most / silo._reach, rel=1e-4)
        root._mean["x"] *= 1.001
        root.add_to(plan := pb.Plan(), layout)
        with pytest.raises(ProtocolError):
            silo.begin(plan, {"x": torch.zeros(3)})


@pytest.mark.parametrize("late", [False, True], ids=["update", "answer"])
@pytest.mark.parametrize("loses", [1, 3])
def test_so_it_is_if_an_update_or_its_answer_is_lost(build: Build, tmp_path: Path, loses: int, late: bool) -> None:
    """The round goes on without the silo, or with it, and it does not know."""
    recipe = build(federation=SCAFFOLD, root={"minimum": 2})
    run = run_of(recipe, tmp_path / "run", loses=loses, late=late)
    counted = run.role("root").load_round(loses)["control"]["counted"]
    assert counted.get("c", 0) == (loses if late else loses - 1)
    for number in range(1, ROUNDS + 1):
        assert_c_is_the_mean(run, number)


def test_so_it_is_if_a_silo_misses_rounds(build: Build, tmp_path: Path) -> None:
    """c's process is gone for the second round and starts again."""
    patience = {"root": {"minimum": 2, "patience": 1.0}}
    run = RunDirectory.create(tmp_path / "run", build(federation=SCAFFOLD, **patience))
    for rounds, names in ((1, NAMES), (2, NAMES[:2]), (ROUNDS, NAMES)):
        sections = patience if rounds == 2 else {}
        federate(build(rounds=rounds, federation=SCAFFOLD, **sections), run, names)
    assert run.role("c").rounds() == {1, 3, 4}
    for number in range(1, ROUNDS + 1):
        assert_c_is_the_mean(run, number)


def test_rounds_go_on_where_they_were_stopped(build: Build, tmp_path: Path) -> None:
    """All roles start anew before each round: the same to the last bit."""
    whole = run_of(build(federation=SCAFFOLD), tmp_path / "whole")
    run = RunDirectory.create(tmp_path / "stopped", build(federation=SCAFFOLD))
    for rounds in range(1, ROUNDS + 1):
        federate(build(rounds=rounds, federation=SCAFFOLD), run)
    assert_same(shared_of(run), shared_of(whole), 0.0)
    kept = [one.role("root").load_round(ROUNDS)["control"] for one in (run, whole)]
    assert_same(kept[0]["mean"], kept[1]["mean"], 0.0)
    for name in NAMES:
        assert_same(settled(run, name), settled(whole, name), 0.0)


def test_a_silo_alone_has_nothing_of_its_own(build: Build, tmp_path: Path) -> None:
    """c is its control: to the last bit what it does without."""
    plain = run_of(build(("a",)), tmp_path / "plain")
    alone = run_of(build(("a",), federation=SCAFFOLD), tmp_path / "alone")
    assert_same(shared_of(alone), shared_of(plain), 0.0)
    assert any(tensor.any() for tensor in alone.role("root").load_round(ROUNDS)["control"]["mean"].values())


def test_an_update_is_no_larger(build: Build, tmp_path: Path) -> None:
    """What leaves a silo in its updates is as much, and noted as often, with controls and without."""
    left = {}
    for name, federation in (("plain", {"weights": "equal"}), ("controlled", SCAFFOLD)):
        run = run_of(build(federation=federation), tmp_path / name)
        releases = read_ledger(run.role("a").path / "ledger.jsonl").releases()
        left[name] = [(one.rows, one.width, one.size) for one in releases if one.path == "update"]
    assert len(left["plain"]) == ROUNDS
    assert left["controlled"] == left["plain"]


def test_a_plan_whose_control_is_of_other_tensors_is_refused(build: Build) -> None:
    control = SiloControl(build(federation=SCAFFOLD), "a")
    named = codec.encode_named({"x": torch.ones(2), "y": torch.ones(2)})
    with pytest.raises(FrameError, match="unexpected tensor 'y'"):
        control.begin(pb.Plan(control=named), {"x": torch.zeros(2)})


def test_a_silo_that_lost_its_control_is_told(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    control = SiloControl(build(federation=SCAFFOLD), "a")
    control.begin(pb.Plan(counted={"a": 3}), {})
    assert "the root knows this silo's control of round 3" in caplog.text


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_equal_steps_normalized_are_as_they_are(build: Build, tmp_path: Path, optimizer: str) -> None:
    train = {"optimizer": optimizer, "learning_rate": 0.001}
    plain = run_of(build(train=train), tmp_path / "plain")
    normalized = run_of(build(train=train, federation={"normalized": True}), tmp_path / "normalized")
    assert_same(shared_of(normalized), shared_of(plain), 0.0)


@pytest.mark.parametrize("normalized", [False, True])
def test_steps_that_were_not_made_do_not_count(build: Build, tmp_path: Path, normalized: bool) -> None:
    """A silo whose rows a budget left out of some steps counts as if it had made them."""
    recipe = build(("a",), train={"steps": 6}, federation={"normalized": normalized})
    run = RunDirectory.create(tmp_path / "run", recipe)
    trunk, root = TrunkService(recipe, run.role("trunk")), root_service(recipe, run.role("root"))
    worker = Worker(recipe, "a", run.role("a"), trunk=loopback(trunk, "a", recipe), root=LoopbackChannel(root, "a"))
    shared = {name: one.detach().clone() for name, one in worker._parameters.items()}
    with torch.no_grad():
        for parameter in worker._parameters.values():
            parameter += 0.25
    for made, scale in ((6, 1.0), (3, 2.0), (1, 6.0)):
        change = worker._change(1, shared, [recipe.train.learning_rate] * made)
        expected = {name: one.detach() - shared[name] for name, one in worker._parameters.items()}
        assert_same(change, {name: (scale if normalized else 1.0) * one for name, one in expected.items()}, 1e-6)
    assert_same(worker._change(1, shared, []), expected, 0.0)  # nothing of it will leave
    worker.close()
    trunk.stop()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_keys_that_ask_for_nothing_change_no_bit(build: Build, tmp_path: Path, optimizer: str) -> None:
    """A round of the worker against its steps taken by hand, with torch's optimizer as it is."""
    nothing = {"momentum": 0.0, "proximal": 0.0, "sharpness": 0.0}
    federation = {"normalized": False, "control": "none"}
    recipe = build(("a",), rounds=1, train={"optimizer": optimizer, **nothing}, federation=federation)
    run = run_of(recipe, tmp_path / "run")
    trunk = TrunkService(recipe, RunDirectory(tmp_path / "by-hand").role("trunk"))
    silo = join(recipe, "a", channel=loopback(trunk, "a", recipe))
    data = load_data(recipe, "a", silo)
    named = {name: one for part in silo.parts for name, one in adapters.trainable(part).items()}
    before = {name: one.detach().clone() for name, one in named.items()}
    steps, drawn = build_optimizer(named.values(), recipe.train), batches(data.train, BATCH, f"{recipe.seed}/a")
    silo.rounds.begin(1, ["a"])
    for number in range(1, STEPS + 1):
        step = train_step(silo.model, steps, collate(next(drawn), data.pad))
        silo.rounds.commit(1, number, step.weight)
    moved = {name: before[name] + (one.detach() - before[name]) for name, one in named.items()}
    assert_same(shared_of(run, 1), moved, 0.0)
    assert_same(run.role("trunk").load_round(1)["adapter"], adapters.adapter_of(trunk._runner.part), 0.0)
    trunk.stop()
