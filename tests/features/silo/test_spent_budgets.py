"""Spent budgets: refused before a frame leaves; in training the record is left out and everything else goes on."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.engines.certificates import make_certificates
from isthmus.errors import BudgetExhausted
from isthmus.federation.aggregator import root_service
from isthmus.federation.rounds import Aggregator
from isthmus.privacy.accountant import Account
from isthmus.privacy.analytic import gaussian_noise
from isthmus.privacy.budget import Budget
from isthmus.privacy.events import ALL
from isthmus.privacy.ledger import MemoryLedger, read_ledger
from isthmus.recipe import Recipe
from isthmus.report.progress import read_progress
from isthmus.silo.worker import Worker
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.updates.quantize import Ring
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import Split, make_recipe, save_tiny_model, write_rows
from tests.oracle.twins import loopback, prompts, ragged
from tests.unit.silo.parties import ROWS, Party

DELTA = 1e-5
CALIBRATED = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 1.0, "delta": DELTA, "unit": "sequence"}
COST = gaussian_noise(1.0, DELTA) ** -2
"""Of one sequence's release."""
STEPS = 3
"""Whole steps that a record can bear."""
ROUNDS, STEPS_A_ROUND, BATCH = 3, 4, 2
BUDGET = Account(2 * STEPS * COST).epsilon(DELTA).value
WAIT = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    boundary = {"forward": CALIBRATED, "gradient": CALIBRATED}
    values = {"privacy": {"record_epsilon": BUDGET}, **sections}
    return make_recipe(folder, boundary=values.pop("boundary", boundary), **values)


def test_a_step_that_cannot_be_borne_is_refused_before_anything_leaves(split: Split, folder: Path) -> None:
    recipe, ledger = recipe_of(folder), MemoryLedger()
    model, _ = split(recipe, ledger=ledger, budget=Budget(recipe.privacy))
    remote = model.trunk
    for seed in range(STEPS):
        model(**ragged("left")).loss.backward()
        remote.rounds.begin(1, ["a"]) if seed == 0 else None
    noted, sent = len(ledger.releases), remote.channel.sent_bytes
    with pytest.raises(BudgetExhausted, match="another forward release of record") as caught:
        model(**ragged("left"))
    assert ledger.releases[0].charges[0].record in caught.value.message
    assert (len(ledger.releases), remote.channel.sent_bytes) == (noted, sent) == (2 * STEPS, sent)
    assert model.boundary.budget.epsilon == pytest.approx(BUDGET)
    model(**ragged("left", seed=1))  # other text is other records


def test_a_gradient_that_cannot_be_borne_is_refused_too(split: Split, folder: Path) -> None:
    recipe, ledger = recipe_of(folder, privacy={"record_epsilon": 1.01}), MemoryLedger()
    model, _ = split(recipe, ledger=ledger, budget=Budget(recipe.privacy))
    loss = model(**ragged("left")).loss
    sent = model.trunk.channel.sent_bytes
    with pytest.raises(BudgetExhausted, match="another gradient release"):
        loss.backward()
    assert model.trunk.channel.sent_bytes == sent
    assert [release.path for release in ledger.releases] == ["forward"]


def test_a_prompt_that_is_spent_is_an_error_to_who_asks(split: Split, folder: Path) -> None:
    recipe, ledger = recipe_of(folder), MemoryLedger()
    model, _ = split(recipe, ledger=ledger, budget=Budget(recipe.privacy))
    with pytest.raises(BudgetExhausted) as caught:
        model.generate(**prompts((5,)), max_new_tokens=50, min_new_tokens=50, do_sample=False)
    assert "privacy.record_epsilon" in caught.value.remedy
    assert len(ledger.releases) == 2 * STEPS


def write_silos(folder: Path, counts: dict[str, int]) -> list[dict[str, str]]:
    def row(number: int) -> dict[str, str]:
        return {"text": f"w{4 + number} w{30 + number}" + " w9" * (number % 3), "reply": f"w{60 + number}"}

    files = {
        name: write_rows(folder / f"{name}.jsonl", [row(number) for number in range(count)])
        for name, count in counts.items()
    }
    return [{"name": name, "train": str(file), "held_out": str(file)} for name, file in files.items()]


def federation_of(model: Path, folder: Path, counts: dict[str, int], **sections: Any) -> Recipe:
    train = {"rounds": ROUNDS, "steps": STEPS_A_ROUND, "batch": BATCH, "learning_rate": 1e-4, "evaluate": False}
    return recipe_of(
        model,
        silo=write_silos(folder, counts),
        task={"prompt": "{text}", "answer": " {reply}"},
        **{**sections, "train": train | sections.pop("train", {})},
    )


def federate(recipe: Recipe, run: RunDirectory) -> dict[str, Worker]:
    trunk, root = TrunkService(recipe, run.role("trunk")), root_service(recipe, run.role("root"))

    def work(name: str) -> Worker:
        threading.current_thread().name = name
        worker = worker_of(recipe, run, name, trunk, root)
        worker.run()
        worker.close()
        return worker

    names = [silo.name for silo in recipe.silo]
    with ThreadPoolExecutor(len(names)) as threads:
        workers = dict(zip(names, threads.map(work, names, timeout=WAIT), strict=True))
    trunk.stop()
    return workers


def worker_of(recipe: Recipe, run: RunDirectory, name: str, trunk: TrunkService, root: Aggregator) -> Worker:
    return Worker(recipe, name, run.role(name), trunk=loopback(trunk, name, recipe), root=LoopbackChannel(root, name))


def steps_of(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    return [line for line in read_journal(run.role(name).path / "metrics.jsonl") if line["event"] == "step"]


def charged(run: RunDirectory, name: str) -> dict[str, Counter[str]]:
    """How often each record was charged, by path."""
    counts: dict[str, Counter[str]] = {"forward": Counter(), "gradient": Counter(), "update": Counter()}
    for release in read_ledger(run.role(name).path / "ledger.jsonl").releases():
        counts[release.path].update(charge.record for charge in release.charges)
    return counts


@pytest.mark.parametrize(("micro_batches", "adapter"), [(1, "shared"), (2, "shared"), (1, "replica")])
def test_training_ends_well_when_records_run_out(
    folder: Path, tmp_path: Path, micro_batches: int, adapter: str
) -> None:
    """Every row of silo a is drawn six times and can bear three; those of silo b are drawn three times."""
    recipe = federation_of(
        folder, tmp_path, {"a": 4, "b": 8}, train={"micro_batches": micro_batches}, trunk={"adapter": adapter}
    )
    run = RunDirectory.create(tmp_path / "run", recipe)
    federate(recipe, run)
    for name, rows, skipped in (("a", 4, 12), ("b", 8, 0)):
        steps = steps_of(run, name)
        assert [(line["round"], line["step"]) for line in steps] == [
            (r, s) for r in range(1, ROUNDS + 1) for s in range(1, STEPS_A_ROUND + 1)
        ]
        assert sum(line.get("skipped", 0) for line in steps) == skipped
        counts = charged(run, name)
        assert len(counts["forward"]) == rows
        assert set(counts["forward"].values()) == set(counts["gradient"].values()) == {STEPS}
        assert max(line["epsilon"] for line in steps) == pytest.approx(BUDGET)
    empty = [line for line in steps_of(run, "a") if line["loss"] is None]
    assert empty == [line for line in steps_of(run, "a") if line.get("skipped") == BATCH]
    assert len(empty) >= STEPS_A_ROUND
    weights = [line["weights"] for line in read_journal(run.role("root").path / "metrics.jsonl")]
    assert weights[0]["a"] > 0
    assert weights[-1]["a"] == 0
    assert all(one["b"] > 0 for one in weights)
    assert charged(run, "a")["update"] == {ALL: ROUNDS - 1}
    progress = read_progress(run, "a", STEPS_A_ROUND)
    assert (progress.loss, progress.skipped, progress.steps) == (None, 12, ROUNDS * STEPS_A_ROUND)


def test_when_all_have_run_out_nothing_moves_any_more(folder: Path, tmp_path: Path) -> None:
    recipe = federation_of(folder, tmp_path, {"a": 4}, train={"rounds": 4})
    run = RunDirectory.create(tmp_path / "run", recipe)
    federate(recipe, run)
    states = [run.role("trunk").load_round(number)["adapter"] for number in range(5)]
    moved = [any(not torch.equal(new[name], old[name]) for name in old) for old, new in itertools.pairwise(states)]
    assert moved == [True, True, False, False]
    shared = [run.role("root").load_round(number)["shared"] for number in (2, 3, 4)]
    assert all(torch.equal(shared[0][name], later[name]) for later in shared[1:] for name in later)


def test_rows_that_run_out_take_their_part_of_a_masked_share(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under masks a silo counts by the part of its planned rows that it trained on, round by round."""
    shares: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    encode_share = Ring.encode_share

    def kept(self: Ring, share: float) -> Any:
        shares[threading.current_thread().name].append(share)
        return encode_share(self, share)

    monkeypatch.setattr(Ring, "encode_share", kept)
    recipe = federation_of(
        folder,
        tmp_path,
        {"a": 6, "b": 8, "c": 8},
        federation={"secure": True},
        wire={"certificates": str(tmp_path / "certificates")},
    )
    make_certificates(recipe, tmp_path / "certificates")
    run = RunDirectory.create(tmp_path / "run", recipe)
    federate(recipe, run)
    planned = STEPS_A_ROUND * BATCH
    for name in shares:
        skipped = [0] * ROUNDS
        for line in steps_of(run, name):
            skipped[line["round"] - 1] += line.get("skipped", 0)
        assert shares[name] == [(planned - rows) / planned for rows in skipped if rows < planned]
    assert 0 < min(shares["a"]) < max(shares["a"]) == 1
    assert shares["b"] == [1.0] * ROUNDS


def test_budgets_outlast_the_process(folder: Path, tmp_path: Path) -> None:
    recipe = federation_of(folder, tmp_path, {"a": 4})
    run = RunDirectory.create(tmp_path / "run", recipe)
    worker = federate(recipe, run)["a"]
    trunk, root = TrunkService(recipe, run.role("trunk")), root_service(recipe, run.role("root"))
    again = worker_of(recipe, run, "a", trunk, root)
    assert again._silo.boundary.budget.epsilon == pytest.approx(worker._silo.boundary.budget.epsilon)
    rows = [row.input for row in again._data.train]
    assert again._silo.boundary.affordable(rows, list(map(len, rows))) == [False] * len(rows)
    again.close()
    trunk.stop()


def test_held_out_rows_that_are_spent_are_not_measured_on(folder: Path, tmp_path: Path) -> None:
    """Measuring after each round costs a release; training spends the same records."""
    recipe = federation_of(folder, tmp_path, {"a": 4}, train={"evaluate": True})
    run = RunDirectory.create(tmp_path / "run", recipe)
    federate(recipe, run)
    lines = [line for line in read_journal(run.role("a").path / "metrics.jsonl") if line["event"] == "evaluation"]
    assert [line["round"] for line in lines] in ([0, 1], [0, 1, 2])
    assert "skipped" not in lines[0]
    assert all(len(charged(run, "a")[path]) == 4 for path in ("forward", "gradient"))
    budget = Budget(recipe.privacy, read_ledger(run.role("a").path / "ledger.jsonl").releases())
    assert budget.epsilon <= BUDGET * (1 + 1e-9)


def test_a_silo_whose_own_budget_is_spent_sends_no_update(folder: Path, tmp_path: Path) -> None:
    update = {"clip": 1.0, "noise": 2.0 / COST**0.5}
    silo_epsilon = Account((2 * BATCH * 6 + 0.5) * COST).epsilon(DELTA).value
    recipe = federation_of(
        folder,
        tmp_path,
        {"a": 4},
        boundary={"forward": CALIBRATED, "gradient": CALIBRATED, "update": update},
        privacy={"silo_epsilon": silo_epsilon},
        train={"steps": 6, "rounds": 2},
    )
    run = RunDirectory.create(tmp_path / "run", recipe)
    federate(recipe, run)
    assert [line["weights"]["a"] for line in read_journal(run.role("root").path / "metrics.jsonl")] == [0.0, 0.0]
    counts = charged(run, "a")
    assert not counts["update"]
    assert sum(counts["forward"].values()) == BATCH * 6


def test_what_was_released_once_costs_only_its_gradient_later(folder: Path, tmp_path: Path) -> None:
    """Two charges the first time, one each time after: 2·STEPS charges bear 2·STEPS − 1 steps instead of STEPS."""
    boundary = {"forward": CALIBRATED, "gradient": CALIBRATED, "release_once": True}
    recipe = recipe_of(folder, boundary=boundary, lora={"freeze_bottom": True}, train={"steps": 99})
    party = Party(recipe, tmp_path)
    rows = [row.input for row in ROWS]
    lengths = list(map(len, rows))
    for _ in range(2 * STEPS - 1):
        assert party.boundary.affordable(rows, lengths) == [True] * len(rows)
        party.epoch()
    assert party.boundary.affordable(rows, lengths) == [False] * len(rows)
    assert party.boundary.affordable(rows, lengths, gradients=0) == [True] * len(rows)
    assert len(party.charged()) == len(rows)
    with pytest.raises(BudgetExhausted, match="gradient"):
        party.epoch()
    party.service.stop()
