"""The tables measure each cell once, hold rows apart, and say no more than their cells do."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.results import Results
from benchmarks.common.rows import Rows, Values
from benchmarks.federated.corpora import Corpus, Files, written
from benchmarks.federated.simulation import merged
from benchmarks.federated.tables import cells, cuts, optimizers, parallel, quality, sets
from benchmarks.federated.tables.cells import Cell
from benchmarks.federated.tables.sets import SILOS, Source, skewed, whole
from tests.conftest import make_recipe, save_tiny_model, write_rows

SMALL: Values = {"model": {"bottom": 1, "top": 1}}
TASK = {"prompt": "{text}", "answer": " {label}", "choices": [" w7", " w8"]}


def rows(count: int, seed: int = 0) -> Rows:
    draw = random.Random(seed)
    words = [" ".join(f"w{draw.randrange(10, 90)}" for _ in range(5)) for _ in range(count)]
    return [{"text": text, "label": f"w{7 + number % 2}", "of": str(number % 4)} for number, text in enumerate(words)]


@pytest.fixture(autouse=True)
def own_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of a test are not kept with the results."""
    monkeypatch.setattr(cells, "FOLDER", tmp_path / "cells")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A set of made-up rows, of which some stand in both files."""
    monkeypatch.setattr(sets, "SHARED", tmp_path)
    monkeypatch.chdir(tmp_path)
    known = rows(60)
    write_rows(tmp_path / "train.jsonl", known)
    write_rows(tmp_path / "test.jsonl", [*rows(12, seed=1), *known[:6]])
    return Source(TASK, ("train.jsonl",), ("test.jsonl",), train=24, validation=8, reported=18)


def texts(some: Rows) -> set[str]:
    return {row["text"] for row in some}


def test_no_row_is_on_two_sides(source: Source) -> None:
    for seed in range(3):
        sample = source.sample(seed)
        train = [row for own in sample.train.values() for row in own]
        sides = [texts(train), texts(sample.validation), texts(sample.reported)]
        assert [len(side) for side in sides] == [24, 8, 18]
        assert len(set.union(*sides)) == 50


def test_seeds_draw_training_rows_alone(source: Source) -> None:
    one, other = source.sample(0), source.sample(1)
    assert one.reported == other.reported
    assert one.validation == other.validation
    assert one.train != other.train
    assert one == source.sample(0)


def test_choices_may_be_all_that_the_training_files_have(source: Source) -> None:
    one = replace(source, task={"prompt": "{text}", "answer": " {label}"}, choices="label")
    assert one.section == TASK
    assert one.sample(0) == source.sample(0)


def test_a_new_key_leaves_what_was_measured_and_a_changed_one_does_not(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, silos=("a", "b"))
    moved = make_recipe(tmp_path / "elsewhere", silos=("a", "b"))
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch": recipe.train.batch + 1})})
    assert cells.recipe_digest(recipe) == cells.recipe_digest(moved) != cells.recipe_digest(other)


def test_rows_of_a_group_stay_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "SHARED", tmp_path)
    talks = [row | {"talk": str(number // 4)} for number, row in enumerate(rows(80))]
    write_rows(tmp_path / "all.jsonl", talks)
    one = Source(TASK, ("all.jsonl",), ("all.jsonl",), train=30, validation=4, reported=4, group="talk")
    sample = one.sample(0)
    train = [row for own in sample.train.values() for row in own]
    sides = [{row["talk"] for row in side} for side in (train, sample.validation, sample.reported)]
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]


def test_silos_differ_in_their_classes(source: Source) -> None:
    train = source.sample(0).train
    shares = [sum(row["label"] == "w7" for row in train[name]) / len(train[name]) for name in SILOS]
    assert shares[0] > 0.7
    assert shares[1] < 0.3
    assert 0.3 < shares[2] < 0.7


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_dealing_loses_no_row(classes: int) -> None:
    some = rows(37)
    dealt = skewed(some, [str(number % classes) for number in range(37)])
    assert sorted(row["text"] for own in dealt.values() for row in own) == sorted(texts(some))


def test_a_natural_value_goes_to_one_silo() -> None:
    dealt = whole(rows(40), "of")
    owners = [{row["of"] for row in own} for own in dealt.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 4


def test_a_cell_is_measured_once() -> None:
    calls = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"value": len(calls)}

    cell = Cell("some/cell", {"rates": (1e-3, 2e-3)})
    assert cell.found() is None
    assert cell.measured(measure) == cell.measured(measure) == cell.found() == {"value": 1}
    assert Cell("some/cell", {"rates": (1e-3,)}).found() is None  # other conditions are another measurement
    assert Cell("some/cell", {"rates": (1e-3,)}).measured(measure) == {"value": 2}


@pytest.mark.parametrize("content", ["", '{"determined": {', "[]", "null"])
def test_a_damaged_cell_is_measured_again(content: str) -> None:
    cells.FOLDER.mkdir()
    (cells.FOLDER / "cell.json").write_text(content)
    assert Cell("cell", {}).found() is None
    assert Cell("cell", {}).measured(lambda: {"value": 1}) == {"value": 1}


def test_arms_are_compared_row_by_row() -> None:
    mine = {0: {"rows": [1.0, 0.0]}, 1: {"rows": [1.0, 1.0]}, 2: None}
    theirs = {0: {"rows": [0.0, 0.0]}, 1: None, 2: {"rows": [1.0, 1.0]}}
    assert quality.paired(mine, theirs).tolist() == [[100.0, 0.0]]


def test_the_interval_is_that_of_the_mean() -> None:
    apart_SR = 10 * torch.randn(40, 400, generator=torch.Generator().manual_seed(0)) + 5
    low, high, error = quality.interval(apart_SR)
    assert low < float(apart_SR.mean()) < high
    assert error == pytest.approx(10 * (2 / 16_000) ** 0.5, rel=0.2)
    assert quality.interval(torch.zeros(1, 9)) == (0.0, 0.0, 0.0)


def test_what_joining_gains_is_the_mean_of_tasks_in_points_and_in_nats() -> None:
    """Long forms are a mean of their own. There is none in nats where some of the cells are of before these were
    measured."""
    table = Results("nowhere", "a test")
    points = (("copa", 60.0, 50.0), ("cb", 70.0, 66.0), ("copa_long", 2.0, 1.0), ("cb_long", 5.0, 2.0))
    for task, ours, theirs in points:
        table.add(f"{task}, federated: accuracy", ours, "%")
        table.add(f"{task}, alone: accuracy", theirs, "%")
    for task in ("copa", "copa_long", "cb_long"):
        table.add(f"{task}, federated: nats", 1.5, "nats")
        table.add(f"{task}, alone: nats", 1.75, "nats")
    quality.report_gains(table)
    said = {row.measure: row for row in table.rows if row.measure.startswith("mean")}
    assert said["mean over tasks, federated above alone"].value == 7
    assert said["mean over tasks, long, federated costs less than alone"].value == 0.25
    assert {row.measure for row in said.values() if row.goal} == {
        "mean over tasks, federated above alone, lower end of the 95 % interval",
        "mean over tasks, long, federated above alone, lower end of the 95 % interval",
        "mean over tasks, long, federated costs less than alone, lower end of the 95 % interval",
    }


def test_a_task_from_rows_to_the_table(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All arms learn and answer; what is measured is not measured again; what is not is said to be missing."""
    monkeypatch.setitem(sets.SOURCES, "made-up", replace(source, steps=2))
    monkeypatch.setattr(quality, "FEDERATED", merged(quality.FEDERATED, SMALL))
    setting = quality.Setting(save_tiny_model("llama", tmp_path / "model"), "cpu", (0, 1))
    quality.run(setting, ["made-up"], ["zero-shot", "pooled"])
    table = Results("nowhere", "a test")
    quality.report(table, setting, ["made-up"])
    assert "made-up, federated: not measured" in capsys.readouterr().out
    assert not [row for row in table.rows if "federated" in row.measure]

    quality.run(setting, ["made-up"], quality.ARMS)
    kept = {path: path.read_bytes() for path in cells.FOLDER.rglob("*.json")}
    assert len(kept) == 2 + 1 + 4 * 2  # rates, without training, and four arms of two seeds
    assert all(set(json.loads(one)) == {"determined", "result"} for one in kept.values())
    quality.run(setting, ["made-up"], quality.ARMS)
    assert kept == {path: path.read_bytes() for path in cells.FOLDER.rglob("*.json")}

    table = Results("nowhere", "a test")
    quality.report(table, setting, ["made-up"])
    said = {row.measure: row.value for row in table.rows}
    assert all(f"made-up, {arm}: accuracy" in said for arm in quality.ARMS)
    assert said["made-up, federated above pooled"] is not None
    assert "made-up, noised above pooled, upper end of the 95 % interval" in said
    assert all(said[f"made-up, {arm}: nats"] > 0 for arm in quality.ARMS)


def test_a_federation_that_sends_gradients_learns_what_the_pooled_model_does(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So both arms read the same rows in the same steps, from the same start."""
    monkeypatch.setitem(sets.SOURCES, "made-up", replace(source, steps=4))
    monkeypatch.setattr(quality, "FEDERATED", merged(quality.FEDERATED, SMALL))
    setting = quality.Setting(save_tiny_model("llama", tmp_path / "model"), "cpu", (0,))
    learning = quality.Learning(setting, "made-up", 0, tmp_path / "rows")
    pooled = learning.learned(SILOS, 1e-3)
    exact = learning.federated({"federation": {"updates": "gradients", "secure": {"masks": False}}}, 1e-3).tensors
    assert pooled.keys() == exact.keys()
    for name, tensor in pooled.items():
        torch.testing.assert_close(exact[name], tensor, rtol=1e-4, atol=1e-6)
        assert not torch.equal(tensor, learning.uncut.untrained[name])


def test_cuts_and_noises_from_rows_to_the_table(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every cut learns what the pooled model does, but for blocks that rest; noise changes what is learned."""
    monkeypatch.setitem(sets.SOURCES, cuts.TASK, replace(source, steps=2))
    monkeypatch.setattr(cuts, "CUTS", ((1, 1), (2, 1)))
    monkeypatch.setattr(cuts, "MIXED", ((1, 1), (2, 1), (1, 2)))
    monkeypatch.setattr(cuts, "BOTTOMS", (1, 2))
    model = save_tiny_model("llama", tmp_path / "model", blocks=5)
    setting = quality.Setting(model, "cpu", (0,))
    table = Results("nowhere", "a test")
    cuts.report(table, setting)
    assert "cuts: not measured" in capsys.readouterr().out

    cuts.run(setting)
    cuts.report(table, setting)
    said = {row.measure: row.value for row in table.rows}
    assert said["cut (1, 1), no noise: loss, step 1"] == said["cut (2, 1), no noise: loss, step 1"]
    assert said["cut (1, 1), no noise, above pooled"] == 0
    assert "cut (1, 1) (2, 1) (1, 2), published noise: accuracy" in said
    assert "bottom 2, noise 0.5 × mean magnitude: loss, steps 1 to 2" in said
    assert said["bottom 1, noise 5 × mean magnitude: loss, step 1"] != said["bottom 1, noise 0: loss, step 1"]
    assert all(row.goal is None for row in table.rows)


def test_another_recipe_is_another_measurement(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sets.SOURCES, "made-up", source)
    setting = quality.Setting(save_tiny_model("llama", tmp_path / "model"), "cpu", (0,))
    with quality.arms_of(setting, "made-up") as by_seed:
        before = {arm: by_seed[0].cell(arm).determined for arm in quality.ARMS}
        monkeypatch.setitem(quality.FEDERATED, "federation", {"lora": "frozen-a"})
        after = {arm: by_seed[0].cell(arm).determined for arm in quality.ARMS}
    assert {arm for arm in quality.ARMS if repr(before[arm]) != repr(after[arm])} == {"federated", "noised"}


def test_ways_to_share_a_trunk_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parallel, "SHARED", tmp_path)
    monkeypatch.setattr(parallel, "SAMPLES", 4)
    monkeypatch.setattr(parallel, "SILOS", (2,))
    (tmp_path / "superglue_record").mkdir()
    write_rows(tmp_path / "superglue_record" / "train32.jsonl", [record_row(number) for number in range(6)])
    setting = quality.Setting(save_tiny_model("llama", tmp_path / "model"), "cpu", (0,))
    table = Results("nowhere", "a test")
    parallel.report(table, setting)
    assert not table.rows
    assert "not measured" in capsys.readouterr().out
    parallel.run(setting)
    parallel.report(table, setting)
    said = {row.measure: row.value for row in table.rows}
    for way in parallel.WAYS:
        assert (said[f"parallel, {way}, 2 silos: time beside centralized"] or 0.0) > 0
    assert said["parallel, replica, 2 silos: time beside centralized, the paper's"] == round(348 / 382, 4)
    assert all(row.goal is None for row in table.rows)  # other work on the machine is in these times


def record_row(number: int) -> dict[str, Any]:
    query = {"query": "w11 @placeholder w12", "answers": [{"text": "w21"}]}
    entities = [{"start": 0, "end": 2}, {"start": 4, "end": 6}]
    return {"passage": {"text": f"w21 w22 w{30 + number}", "entities": entities}, "qas": [query, query], "idx": number}


def test_optimizers_are_compared_with_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every optimizer's recipe holds; those that make rounds uneven run and are compared. Six silos, two rounds."""
    monkeypatch.chdir(tmp_path)
    model = save_tiny_model("llama", tmp_path / "model")

    def files(folder: Path, silos: int) -> Files:
        return written(
            folder, {f"s{number}": (rows(8, seed=number), rows(2, seed=99 + number)) for number in range(silos)}
        )

    sections = {"model": {"bottom": 1, "top": 1}, "task": TASK, "train": {"batch": 2}, "lora": {"rank": 2}}
    monkeypatch.setattr(optimizers, "CORPORA", {"made-up": Corpus(lambda: model, files, sections)})
    monkeypatch.setattr(optimizers, "ROUNDS", 2)
    monkeypatch.setattr(optimizers, "SILOS", 6)
    monkeypatch.setattr(optimizers, "UNEQUAL", (1, 2, 3, 1, 1, 2))
    monkeypatch.setattr(optimizers, "STEPS", 1)
    every = optimizers.OPTIMIZERS
    for name in every:
        assert optimizers.recipe_for("made-up", name, 0, 1e-2, tmp_path, False).train.rounds == 2
    few = ("FedAvg", "buffered", "FedAvg, unequal steps", "FedNova")
    monkeypatch.setattr(optimizers, "OPTIMIZERS", {one: replace(every[one], rates=every[one].rates[:1]) for one in few})
    table = Results("nowhere", "a test")
    optimizers.report(table, (0,))
    assert not table.rows
    optimizers.run((0,))
    optimizers.report(table, (0,))
    assert "not measured" in capsys.readouterr().out
    measures = {row.measure for row in table.rows}
    for name, one in optimizers.OPTIMIZERS.items():
        assert f"made-up, {name}: loss after 2 rounds, 1 seeds" in measures
        compared = f"made-up, {name}: rounds to the loss of {one.against}, of 2" in measures
        assert compared == (name != one.against)
