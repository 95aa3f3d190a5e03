"""The round that is used: the best by held-out rows, the last, or one that is kept."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.engines.baselines import train_baseline, trained_baseline
from isthmus.engines.batch import answer_file
from isthmus.engines.chosen_round import best_round, better_round, chosen_round, journal_scores
from isthmus.engines.evaluation import evaluate_run
from isthmus.engines.export import final_adapter
from isthmus.engines.local import create_run
from isthmus.engines.opening import open_run
from isthmus.errors import RecipeError, RunError
from isthmus.model import adapters
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from tests.conftest import write_rows
from tests.integration.processes import call, rows_of, train_here, write_federation, write_recipe

pytestmark = pytest.mark.usefixtures("trunk_here")
ROUNDS, EVERY = 24, 2
SILOS = [{"name": name, "train": f"{name}.jsonl", "held_out": "other.jsonl"} for name in ("north", "south")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run whose best round is neither its last nor among the last that are kept: it learns by heart."""
    folder = tmp_path_factory.mktemp("best")
    write_rows(folder / "other.jsonl", rows_of("other"))
    train = {"rounds": ROUNDS, "steps": 1, "keep_rounds": 2, "evaluate": "best", "learning_rate": 0.1}
    made = create_run(Recipe.read(write_federation(folder, train=train, silo=SILOS)), folder / "run")
    train_here(made)
    return made


def best_of(run: RunDirectory) -> int:
    """By its definition, from the journals alone."""
    found: dict[int, list[float]] = {}
    for silo in ("north", "south"):
        for line in read_journal(run.role(silo).path / "metrics.jsonl"):
            if line["event"] == "evaluation" and line["round"]:
                found.setdefault(line["round"], []).append(line["loss"])
    return min(found, key=lambda number: statistics.fmean(found[number]))


def ends(run: RunDirectory, **how: Any) -> dict[str, torch.Tensor]:
    with open_run(run.path, "north", **how) as silo:
        return {name: one.detach().clone() for part in silo.parts for name, one in adapters.trainable(part).items()}


def test_the_best_round_is_kept_and_used(run: RunDirectory, tmp_path: Path) -> None:
    best = best_of(run)
    assert best < ROUNDS - 2, "the last rounds are worse"
    for role in ("trunk", "root", "north"):
        assert run.role(role).rounds() - {0} == {*range(EVERY, ROUNDS, EVERY), ROUNDS - 1, ROUNDS}
    assert chosen_round(run) == chosen_round(run, "best") == best
    assert chosen_round(run, "last") is None
    for asked, number in ((None, best), ("best", best), ("last", ROUNDS), (4, 4), ("4", 4)):
        expected = run.role("root").load_round(number)["shared"]
        for name, tensor in ends(run, round=asked).items():
            assert torch.equal(tensor, expected[name])
        assert final_adapter(run, chosen_round(run, asked))[0] == number
    rows, told = write_rows(tmp_path / "in.jsonl", [{"text": "w5 w6"}]), []
    answer_file(run, rows, tmp_path / "out.jsonl", "north", max_new_tokens=1)
    assert f'"round": {best}' in (tmp_path / "out.jsonl").read_text()
    answer_file(run, rows, tmp_path / "last.jsonl", "north", max_new_tokens=1, round="last")
    assert f'"round": {ROUNDS}' in (tmp_path / "last.jsonl").read_text()
    list(evaluate_run(run, ["north"], max_new_tokens=1, notify=told.append))
    assert any("chosen by these held-out rows" in line for line in told)
    told.clear()
    list(evaluate_run(run, ["north"], max_new_tokens=1, round="last"))
    assert told == []


@pytest.mark.parametrize("asked", ["first", "-1", "0", 0, "٣", "1.5", ""])
def test_what_names_no_round_is_refused(asked: str | int, run: RunDirectory) -> None:
    with pytest.raises(RecipeError, match="is no round") as caught:
        chosen_round(run, asked)
    assert "best, last, or the number" in caught.value.remedy


def test_a_round_that_is_not_kept_is_named_with_those_that_are(run: RunDirectory) -> None:
    with pytest.raises(RunError, match="keeps no round 3") as caught:
        open_run(run.path, "north", round=3)
    assert "2, 4, 6" in caught.value.remedy
    open_run(run.path, "north", round="last").close()


def test_a_trunk_that_serves_another_round_is_refused(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.engines import opening

    serving = opening.serving
    monkeypatch.setattr(opening, "serving", lambda run, *, number: serving(run, number=6))
    with pytest.raises(RunError, match="serves round 6, not round 4") as caught:
        open_run(run.path, "north", round=4)
    assert "--round 4" in caught.value.remedy
    open_run(run.path, "north", round=6).close()


def test_the_best_is_there_and_named_where_the_last_is_used(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that measures every second round, and does not ask for the best."""
    train = {"rounds": ROUNDS, "steps": 1, "keep_rounds": 2, "evaluate": EVERY, "learning_rate": 0.1}
    recipe = write_recipe(run.recipe_path.parent.parent / "plain.toml", train=train, silo=SILOS)
    made = create_run(Recipe.read(recipe), tmp_path / "run")
    train_here(made)
    best = best_of(made)
    assert chosen_round(made) is None
    kept = {round for round in range(1, ROUNDS + 1) if made.recipe().train.keeps(round)}
    for role in ("trunk", "root", "north"):
        assert run.role(role).rounds() - {0} >= kept
    scores = [journal_scores(made.role(name).path / "metrics.jsonl") for name in ("north", "south")]
    chosen = best_round(scores, kept)
    assert chosen is not None
    assert chosen == best or best not in kept
    assert better_round(made, ROUNDS) == chosen_round(made, "best") == chosen
    assert better_round(made, chosen) is None
    exported = call(capsys, monkeypatch, "export", made.path, tmp_path / "last")
    exported.succeeded()
    assert f"round {chosen} was better: isthmus export {made.path} OUT --round best" in exported.err
    exported = call(capsys, monkeypatch, "export", made.path, tmp_path / "best", "--round", "best")
    exported.succeeded()
    assert "was better" not in exported.err


def test_without_measured_rounds_there_is_no_best(tmp_path: Path) -> None:
    train = {"rounds": 1, "steps": 1, "evaluate": False}
    run = create_run(Recipe.read(write_federation(tmp_path, train=train)), tmp_path / "run")
    train_here(run)
    with pytest.raises(RunError, match="was measured on held-out rows") as caught:
        chosen_round(run, "best")
    assert 'train.evaluate = "best"' in caught.value.remedy
    assert chosen_round(run) is None


def test_the_best_of_scores_is_that_of_its_definition() -> None:
    draw = random.Random(3)
    for _ in range(200):
        accurate = draw.random() < 0.5
        silos = []
        for _ in range(draw.randrange(1, 4)):
            rounds = draw.sample(range(7), draw.randrange(2, 7))
            values = {number: draw.randrange(4) / 4 for number in rounds}
            silos.append(
                {n: {"accuracy": v} if accurate else {"loss": v, "perplexity": 1.0} for n, v in values.items()}
            )
        kept = set(draw.sample(range(8), 5))
        possible = [n for n in range(1, 8) if n in kept and all(n in silo for silo in silos)]
        worth = {
            n: statistics.fmean(silo[n]["accuracy"] if accurate else -silo[n]["loss"] for silo in silos)
            for n in possible
        }
        expected = min((n for n in possible if worth[n] == max(worth.values())), default=None)
        assert best_round([*silos, {}], kept) == expected
    assert best_round([]) is None


def test_a_baseline_is_compared_at_its_own_best_round(run: RunDirectory) -> None:
    train_baseline(run, "pooled")
    folder = run.path / "baselines" / "pooled"
    scores = [journal_scores(folder / "metrics.jsonl", name) for name in ("north", "south")]
    best = best_round(scores)
    assert best is not None
    found = {asked: trained_baseline(run, "pooled", "north", asked) for asked in (None, "last", best)}
    for tensors in found.values():
        assert tensors is not None
    assert all(torch.equal(one, found[best][name]) for name, one in found[None].items())  # type: ignore[index, union-attr]
    assert best < ROUNDS
    assert not all(torch.equal(one, found["last"][name]) for name, one in found[None].items())  # type: ignore[index, union-attr]
    with pytest.raises(RunError, match="keeps no round 3"):
        trained_baseline(run, "pooled", "north", 3)
