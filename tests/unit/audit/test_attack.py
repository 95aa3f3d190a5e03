"""The command's logic on a recipe and on a run: who sees what, what is written, and bad orders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from isthmus.audit.attack import RESULTS_NAME, AttackPlan, open_target, results_table, run_attacks, save_results
from isthmus.audit.public_text import sample_public_text
from isthmus.audit.target import Target
from isthmus.errors import AttackError, RunError
from isthmus.federation.aggregator import root_service
from isthmus.model.checkpoint import Checkpoint
from isthmus.silo.join import greeting
from isthmus.silo.worker import Worker
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel
from tests.integration.processes import call
from tests.unit.attacks.attacked import random_rows, say

ORDER = AttackPlan(attacks=("linear", "matching"), rows=6, own_rows=60)


def quiet(message: str) -> None:
    assert message


@pytest.fixture
def ran(two_silos: Target, tmp_path: Path) -> Target:
    """The recipe after one round of silo ``a``."""
    run = RunDirectory.create(tmp_path / "run", two_silos.recipe)
    trunk, root = TrunkService(run.recipe(), run.role("trunk")), root_service(run.recipe(), run.role("root"))
    hello = greeting(Checkpoint(run.recipe().model.path), run.recipe())
    channels = LoopbackChannel(trunk, "a", greeting=hello), LoopbackChannel(root, "a")
    Worker(run.recipe(), "a", run.role("a"), trunk=channels[0], root=channels[1]).run()
    trunk.stop()
    return open_target(run.path)


def accuracies(source: Target, order: AttackPlan) -> dict[tuple[str, str, str], float]:
    results = run_attacks(source, order, quiet)
    return {(one.adversary, one.attack, one.tokens): one.figures["token_accuracy"].value for one in results}


def test_a_recipe_is_attacked_as_it_stands(two_silos: Target, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(two_silos.recipe.toml())
    found = accuracies(open_target(path), ORDER)
    assert found["trunk+silo", "matching", "all"] == 1.0
    assert found["trunk+silo", "matching", "text"] == 1.0
    assert found["trunk+silo", "linear", "text"] < found["trunk+silo", "linear", "all"]


def test_a_colluding_silo_knows_the_runs_adapters_and_the_trunk_alone_does_not(ran: Target) -> None:
    assert ran.completed == 1
    assert max(float(tensor.abs().max()) for tensor in ran.shared().values()) > 0
    assert ran.run is not None
    files = sorted(ran.run.path.rglob("*"))
    found = accuracies(ran, replace(ORDER, adversaries=("trunk", "trunk+silo"), own_rows=40))
    assert found["trunk+silo", "matching", "all"] == 1.0
    assert 0.2 < found["trunk", "matching", "all"] <= 1.0
    assert sorted(ran.run.path.rglob("*")) == files


@pytest.mark.parametrize(
    ("attack", "adversary", "methods"),
    [
        ("steering", "root+trunk", {"steered", "unsteered"}),
        ("hijacking", "trunk+silo", {"hijacked", "unhijacked"}),
    ],
)
def test_a_finished_run_is_attacked_in_one_more_round(
    ran: Target, tmp_path: Path, attack: str, adversary: str, methods: set[str]
) -> None:
    assert ran.run is not None
    public = tmp_path / "public.txt"
    public.write_text("\n".join(say(row.input) for row in random_rows(60, 3)))
    files = sorted(ran.run.path.rglob("*"))
    results = run_attacks(ran, replace(ORDER, attacks=(attack,), adversaries=(adversary,), public=public), quiet)
    assert {one.tokens for one in results} == methods
    assert all(one.figures.keys() == {"accuracy", "chance"} and one.rows == 6 for one in results)
    assert sorted(ran.run.path.rglob("*")) == files
    save_results(ran.run, results)
    results_table(results)


def test_results_are_written_in_place_of_earlier_ones(ran: Target) -> None:
    assert ran.run is not None
    results = run_attacks(ran, replace(ORDER, attacks=("linear",)), quiet)
    save_results(ran.run, results)
    path = save_results(ran.run, results)
    written = json.loads(path.read_text())
    assert [(one["attack"], one["tokens"]) for one in written] == [("linear", "all"), ("linear", "text")]
    assert set(written[0]["figures"]["rougeL"]) == {"value", "low", "high"}
    path.write_text("[1, 2")
    with pytest.raises(RunError, match="does not hold results of attacks"):
        save_results(ran.run, results)
    assert path.name == RESULTS_NAME


def test_the_table_shows_every_result(two_silos: Target) -> None:
    results = run_attacks(
        two_silos, replace(ORDER, attacks=("linear",)), quiet, sensitive=lambda row: [True] * len(row)
    )
    console = Console(width=200, record=True)
    console.print(results_table(results))
    text = console.export_text()
    assert all(word in text for word in ("linear", "trunk+silo", "all", "text", "sensitive"))


def test_the_command_prints_and_writes(
    ran: Target, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ran.run is not None
    monkeypatch.setenv("COLUMNS", "160")
    shown = call(capsys, monkeypatch, "attack", str(ran.run.path), "--attack", "linear", "--rows", "3")
    shown.succeeded()
    assert "trunk+silo" in shown.out
    assert (ran.run.path / RESULTS_NAME).exists()
    refused = call(capsys, monkeypatch, "attack", str(ran.run.path), "--attack", "magic")
    assert refused.code == 1
    assert "there is no attack 'magic'" in refused.err


def test_answers_can_be_attacked(two_silos: Target) -> None:
    found = accuracies(two_silos, replace(ORDER, attacks=("matching",), inference=True, rows=2))
    assert found == {("trunk+silo", "matching", "all"): 1.0, ("trunk+silo", "matching", "text"): 1.0}


def test_public_text_is_read_from_a_file(two_silos: Target, tmp_path: Path) -> None:
    public = tmp_path / "public.txt"
    public.write_text("\n".join(f"w{4 + n % 90} w{9 + n % 80} w{5 + n % 70}" for n in range(200)))
    found = accuracies(two_silos, replace(ORDER, adversaries=("trunk",), public=public, own_rows=200))
    assert found["trunk", "matching", "all"] == 1.0


def test_text_drawn_from_the_public_model_leaves_torchs_own_draw_alone(attacked_model: Path) -> None:
    before = torch.get_rng_state()
    one, two = sample_public_text(attacked_model, 1, 70, 5), sample_public_text(attacked_model, 1, 70, 5)
    assert one == two
    assert sample_public_text(attacked_model, 2, 70, 5) != one
    assert {len(row) for row in one} == {6}
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"attacks": ("guessing",)}, "there is no attack 'guessing'"),
        ({"adversaries": ("everyone",)}, "there is no adversary 'everyone'"),
        ({"adversaries": ("outsider",)}, "'outsider' sees no crossings"),
        ({"adversaries": ("aggregator",)}, "'aggregator' sees no crossings"),
        ({"rows": 0}, "0 rows"),
        ({"colluder": "a"}, "no silo colludes against a"),
        ({"public": Path("absent.txt"), "adversaries": ("trunk",)}, "cannot read absent.txt"),
    ],
)
def test_impossible_orders_are_named(two_silos: Target, wrong: dict[str, object], complaint: str) -> None:
    with pytest.raises(AttackError, match=complaint):
        run_attacks(two_silos, replace(ORDER, **wrong), quiet)
