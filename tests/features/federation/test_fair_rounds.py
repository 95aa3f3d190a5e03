"""Whole federations whose silos give way to one another, open and masked, and silos that tell how good they are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.federation.aggregator import root_service
from isthmus.federation.planner import RootPlanner
from isthmus.federation.rounds import Rounds
from isthmus.federation.strategies.weights import FLOOR
from isthmus.recipe import FairnessSection, Recipe
from isthmus.silo.fairness import factor, starting_loss
from isthmus.silo.update import OpenUpdates
from isthmus.silo.worker import Worker
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import VOCABULARY, make_recipe, save_tiny_model, write_rows
from tests.features.federation.test_masked_rounds import NAMES, RANGE, SHAPES, STEP, Federation
from tests.oracle.twins import loopback

WAIT = 120.0
LOSSES = {"a": 0.3, "b": 1.0, "c": 1.9, "d": 3.0}
STEPS, BATCH, ROWS = 2, 2, 4


@pytest.mark.parametrize("kind", ["q-ffl", "tilted", "agnostic"])
@pytest.mark.parametrize("optimizer", ["none", "momentum", "yogi"])
def test_masked_and_open_rounds_agree_with_the_same_fairness(tmp_path: Path, kind: str, optimizer: str) -> None:
    """Silos whose factors are the same: the open root is told them, the masked one gets them in the sum."""
    section = FairnessSection.model_validate({"kind": kind, "bound": 8.0})
    factors = {name: factor(section, loss) for name, loss in LOSSES.items()}
    assert len(set(factors.values())) > 2
    federation = {"weights": "equal", "fairness": {"kind": kind, "bound": 8.0}, "optimizer": optimizer}
    masked = Federation(RoleDirectory(tmp_path / "masked"), federation=federation)
    assert masked.finish(masked.begin(), share=factors) == dict.fromkeys(NAMES)
    recipe = make_recipe(Path("none"), silos=NAMES, federation=federation)
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    planner = RootPlanner(recipe, zeros, RoleDirectory(tmp_path / "open"))
    rounds = Rounds(recipe, planner)
    for answer in [rounds.ready(name, pb.Ready()) for name in NAMES]:
        answer.result(WAIT)
    for name in NAMES:
        tensors = codec.encode_named(masked.changes[name])
        rounds.contribute(name, pb.Update(round=1, weight=factors[name], tensors=tensors))
    off = len(NAMES) / sum(factors.values()) * STEP * 1.1
    slope = 1.0 if optimizer != "yogi" else 1e-3 / (2 * 1e-3)  # largest slope of a step in the change: rate/2τ
    for name in SHAPES:
        assert (masked.root.planner.shared[name] - planner.shared[name]).abs().max() <= slope * off
        assert planner.shared[name].abs().max() <= RANGE


# --- with workers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


Build = Callable[..., Recipe]


@dataclass(frozen=True)
class Sent:
    """What a silo sent beside its change."""

    silo: str
    round: int
    weight: float
    share: float
    quality: float


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """What all silos send, as it comes."""
    kept: list[Sent] = []
    pack = OpenUpdates.pack

    def keep(self: OpenUpdates, plan: Any, change: Any, weight: float, share: float, quality: float = 0.0) -> Any:
        kept.append(Sent(self._channel._peer, plan.round, weight, share, quality))  # type: ignore[attr-defined]
        return pack(self, plan, change, weight, share, quality)

    monkeypatch.setattr(OpenUpdates, "pack", keep)
    return kept


@pytest.fixture
def build(folder: Path, tmp_path: Path) -> Build:
    """A recipe of two silos with rows of their own."""

    def recipe(rounds: int = 2, **sections: Any) -> Recipe:
        silos = []
        for place, name in enumerate(("a", "b")):
            rows = [{"text": f"w{4 + row} w{30 + row}", "reply": f"w{60 + place * row}"} for row in range(ROWS)]
            file = str(write_rows(tmp_path / f"{name}.jsonl", rows))
            silos.append({"name": name, "train": file, "held_out": file})
        train = {"rounds": rounds, "steps": STEPS, "batch": BATCH, "evaluate": False}
        task = sections.pop("task", {"prompt": "{text}", "answer": " {reply}"})
        return make_recipe(folder, silo=silos, train=train, task=task, **sections)

    return recipe


def federate(recipe: Recipe, run: RunDirectory) -> None:
    trunk, root = TrunkService(recipe, run.role("trunk")), root_service(recipe, run.role("root"))

    def work(name: str) -> None:
        ways = {"trunk": loopback(trunk, name, recipe), "root": LoopbackChannel(root, name)}
        worker = Worker(recipe, name, run.role(name), **ways)
        worker.run()
        worker.close()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, ("a", "b"), timeout=WAIT))
    trunk.stop()


def journal(run: RunDirectory, name: str, event: str | None = None) -> list[dict[str, Any]]:
    lines = read_journal(run.role(name).path / "metrics.jsonl")
    return [line for line in lines if event is None or line["event"] == event]


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_a_silo_scales_its_own_weight_by_its_loss(build: Build, tmp_path: Path, sent: list[Sent], weights: str) -> None:
    fairness = {"kind": "agnostic", "reference": 6.0, "bound": 1e6}
    recipe = build(federation={"fairness": fairness, "weights": weights})
    run = RunDirectory.create(tmp_path / "run", recipe)
    federate(recipe, run)
    told = [line["weights"] for line in journal(run, "root")]
    for name in ("a", "b"):
        before = 1.0
        for line, weight in zip(journal(run, name, "fairness"), told, strict=True):
            steps = [step for step in journal(run, name, "step") if step["round"] == line["round"]]
            assert line["loss"] == starting_loss([step["loss"] for step in steps])
            before = factor(recipe.federation.fairness, line["loss"], before)
            assert line["factor"] == before < 1.0
            tokens = 2 * STEPS * BATCH  # an answer and the end of its text
            (own,) = (one for one in sent if (one.silo, one.round) == (name, line["round"]))
            assert (own.weight, own.share) == (weight[name], before)  # every planned row took part
            assert weight[name] == pytest.approx(before * (1 if weights == "equal" else tokens), rel=1e-9)
        assert run.role(name).load_round(2)["factor"] == before


def test_agnostic_goes_on_where_a_killed_silo_was(build: Build, tmp_path: Path) -> None:
    fairness = {"kind": "agnostic", "reference": 6.0, "bound": 1e6}
    runs = {}
    for name, lives in (("whole", [3]), ("cut", [2, 3])):
        for rounds in lives:
            recipe = build(rounds, federation={"fairness": fairness, "optimizer": "momentum"})
            runs[name] = RunDirectory.create(tmp_path / name, recipe) if rounds == lives[0] else runs[name]
            federate(recipe, runs[name])
    whole, cut = (run.role("root").load_round(3)["shared"] for run in runs.values())
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    for name in ("a", "b"):
        assert journal(runs["whole"], name, "fairness") == journal(runs["cut"], name, "fairness")


@pytest.mark.parametrize("choices", [(), tuple(f" w{number}" for number in range(60, 64))], ids=["text", "choices"])
def test_quality_is_told_only_if_the_recipe_says_so(
    build: Build, tmp_path: Path, sent: list[Sent], choices: tuple[str, ...]
) -> None:
    task = {"prompt": "{text}", "answer": " {reply}", "choices": choices}
    for weights in ("quality", "examples"):
        sent.clear()
        run = RunDirectory.create(tmp_path / weights, build(task=task, federation={"weights": weights}))
        federate(run.recipe(), run)
        told = [{one.silo: one.quality for one in sent if one.round == number} for number in (1, 2)]
        lines = journal(run, "root")
        if weights == "examples":
            assert told == [{"a": 0.0, "b": 0.0}] * 2
            assert all("shares" not in line for line in lines)
            continue
        for qualities, line in zip(told, lines, strict=True):
            assert all(0.0 <= one <= 1.0 for one in qualities.values())
            assert choices or all(qualities.values())
            scores = {name: max(FLOOR, quality) for name, quality in qualities.items()}
            shares = {name: score / sum(scores.values()) for name, score in scores.items()}
            assert line["shares"] == pytest.approx(shares)


def test_under_quality_a_loss_is_told_as_a_tokens_likelihood(build: Build, tmp_path: Path, sent: list[Sent]) -> None:
    run = RunDirectory.create(tmp_path / "run", build(federation={"weights": "quality"}))
    federate(run.recipe(), run)
    assert all(one.quality == pytest.approx(1 / VOCABULARY, rel=0.5) for one in sent)  # nothing is learned yet
