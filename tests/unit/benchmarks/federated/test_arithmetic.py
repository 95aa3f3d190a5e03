"""The federated benchmarks' own arithmetic: clocks, seeds, ratios, and rows that are held apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.results import Results
from benchmarks.common.rows import read
from benchmarks.federated import convergence, demo, fairness, poisoned, simulation, sums
from benchmarks.federated.corpora import SPEAKING, Files, with_validation, written
from benchmarks.federated.evaluation import Score
from benchmarks.federated.simulation import Clock, Times
from benchmarks.federated.sums import Graph, Sum, complete
from benchmarks.federated.trials import Trial
from isthmus.wire import isthmus_pb2 as pb


def values(found: Results) -> dict[str, float | None]:
    return {row.measure: row.value for row in found.rows}


def met(found: Results) -> dict[str, bool | None]:
    return {row.measure: row.met for row in found.rows if row.goal}


def clock_of(
    monkeypatch: pytest.MonkeyPatch, marks: Sequence[tuple[str, Any, float, float]], synchronized: bool = False
) -> Clock:
    """A clock after these calls: peer, request, the peer's processor time, and the process's."""
    clock = Clock(2, synchronized=synchronized)
    for peer, request, thread, process in marks:
        monkeypatch.setattr(simulation.time, "thread_time", lambda thread=thread: thread)
        monkeypatch.setattr(simulation.time, "process_time", lambda process=process: process)
        clock.note(peer, request)
    return clock


def test_side_by_side_is_the_slowest_silo_and_all_work_of_trunk_and_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silo a computes 3 s, b 5 s, trunk and root 4 s: 9 s side by side, 12 s summed."""
    ready, again = pb.Ready(completed=0), pb.Ready(completed=1)
    clock = clock_of(
        monkeypatch, [("a", ready, 0.0, 0.0), ("b", ready, 0.0, 0.0), ("a", again, 3.0, 12.0), ("b", again, 5.0, 12.0)]
    )
    assert clock.times() == (Times(side_by_side=9.0, summed=12.0),)


@pytest.mark.parametrize(("synchronized", "side_by_side"), [(True, 9.0), (False, 7.0)])
def test_silos_that_wait_at_each_step_wait_for_the_slowest_there(
    monkeypatch: pytest.MonkeyPatch, synchronized: bool, side_by_side: float
) -> None:
    """a takes 1 s and 4 s around the barrier, b 3 s and 2 s; trunk and root 2 s (12 s in all)."""
    ready, commit, again = pb.Ready(completed=0), pb.Commit(round=1, step=1), pb.Ready(completed=1)
    clock = clock_of(
        monkeypatch,
        [
            ("a", ready, 0.0, 0.0),
            ("b", ready, 0.0, 0.0),
            ("a", commit, 1.0, 5.0),
            ("b", commit, 3.0, 5.0),
            ("a", again, 5.0, 12.0),
            ("b", again, 5.0, 12.0),
        ],
        synchronized,
    )
    assert clock.times() == (Times(side_by_side, 12.0),)


def trial(losses: Sequence[float], seconds: float, accuracy: float = 0.5, probed: float = 0.0) -> Trial:
    """Losses after rounds 1, 2, …, each of which takes so many seconds side by side and thrice as many summed."""
    scores = {number: {"a": Score(loss, accuracy, 10)} for number, loss in enumerate(losses, 1)}
    return Trial(scores, tuple(Times(seconds, 3 * seconds) for _ in losses), 0.0, probed)


def test_time_saved_is_of_fedavgs_whole_time() -> None:
    """FedAvg needs 2 rounds of 10 s, the fast recipe 3 of 4 s: 12 of 20 s, 40 % less, in either way of counting."""
    found = Results("name", "make bench-name")
    convergence.report(found, "race", [trial([3.0, 2.0], 10.0)], [trial([4.0, 3.0, 2.0, 1.0], 4.0)])
    time = convergence.TIME
    assert values(found) == {
        "race, FedAvg: loss after all rounds": 2.0,
        "race, fast: loss after all rounds": 1.0,
        "race, FedAvg: accuracy after all rounds": 50.0,
        "race, fast: accuracy after all rounds": 50.0,
        "race, fast: rounds to FedAvg's loss after 2": 3.0,
        f"race, FedAvg: {time}, side by side": 20.0,
        f"race, fast: {time} to FedAvg's loss, side by side": 12.0,
        f"race: {time} saved, side by side": 40.0,
        f"race, FedAvg: {time}, summed": 60.0,
        f"race, fast: {time} to FedAvg's loss, summed": 36.0,
        f"race: {time} saved, summed": 40.0,
    }
    assert met(found) == {f"race: {time} saved, side by side": True}


def test_rates_are_chosen_on_validation_rows_and_reported_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate that is best on validation rows is worst on held-out rows here, and is taken all the same."""
    validation, reported = {0.1: 1.0, 0.2: 3.0}, {0.1: 9.0, 0.2: 5.0}
    choosing, reporting = with_validation(SPEAKING)
    monkeypatch.setattr(convergence, "with_validation", lambda corpus: (choosing, reporting))

    def run(race: convergence.Race, corpus: object, recipe: object, rate: float, seed: int) -> Trial:
        return trial([(validation if corpus is choosing else reported)[rate]], 1.0)

    monkeypatch.setattr(convergence.Race, "run", run)
    found = Results("name", "make bench-name")
    convergence.compare(found, replace(convergence.RACES[0], name="race", rates=(0.1, 0.2)))
    assert values(found)["race, FedAvg at learning rate 0.1: loss of validation rows"] == 1.0
    assert values(found)["race, FedAvg: loss after all rounds"] == 9.0
    assert values(found)["race, fast: loss after all rounds"] == 9.0


def test_validation_rows_are_neither_trained_on_nor_held_out(tmp_path: Path) -> None:
    rows = [{"text": str(number)} for number in range(40)]

    def files(folder: Path, silos: int) -> Files:
        return written(folder, {f"silo-{n}": (rows[20 * n :][:16], rows[20 * n + 16 :][:4]) for n in range(silos)})

    parts = [one.files(tmp_path / "rows", 2) for one in with_validation(replace(SPEAKING, files=files))]
    choosing, reporting = ({name: {k: read(p) for k, p in f.items()} for name, f in one.items()} for one in parts)
    for number, name in enumerate(("silo-0", "silo-1")):
        own = rows[20 * number :][:20]
        assert choosing[name]["train"] == reporting[name]["train"]
        assert reporting[name]["held_out"] == own[16:]
        assert choosing[name]["held_out"] == own[:16:6]
        three = [*reporting[name]["train"], *choosing[name]["held_out"], *reporting[name]["held_out"]]
        assert sorted(map(str, three)) == sorted(map(str, own))


def test_fairness_is_of_the_worst_silo_seed_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unequal(worst: float, best: float) -> Trial:
        return Trial({1: {"a": Score(1.0, worst, 10), "b": Score(2.0, best, 1000)}}, (), 0.0)

    runs = iter([unequal(0.10, 0.50), unequal(0.20, 0.40), unequal(0.12, 0.46), unequal(0.24, 0.34)])
    monkeypatch.setattr(fairness, "SEEDS", (0, 1))
    monkeypatch.setattr(fairness, "tried", lambda *args, **settings: next(runs))
    found = Results("name", "make bench-name")
    fairness.measure(found)
    told = values(found)
    assert told["fairness, FedAvg: worst silo's accuracy"] == 15.0
    assert told["fairness, FedAvg: mean of silos' accuracies"] == 30.0
    assert told["fairness: what the worst silo gains"] == 3.0
    assert told["fairness: what the worst silo gains, range of 2 seeds"] == 2.0
    assert told["fairness: what the mean loses"] == 1.0
    assert next(row.goal for row in found.rows if row.goal) == "≥ 3.0"


def test_what_an_attack_costs_is_against_the_mean_without_one() -> None:
    calm, hit = [trial([1.0], 1.0, 0.8), trial([1.0], 1.0, 0.7)], [trial([1.0], 1.0, 0.75), trial([1.0], 1.0, 0.69)]
    found = Results("name", "make bench-name")
    for recipe in ("mean", "robust"):
        poisoned.report(found, f"sign flip, {recipe}", hit, calm)
    assert values(found)["sign flip, robust: accuracy lost"] == 3.0
    assert values(found)["sign flip, robust: accuracy lost, range of 2 seeds"] == 4.0
    assert met(found) == {"sign flip, robust: accuracy lost": False}


def test_a_backdoor_is_also_measured_by_what_it_triggers() -> None:
    found = Results("name", "make bench-name")
    poisoned.report(found, "backdoor, robust", [trial([1.0], 1.0, 0.5, probed=0.04)], [trial([1.0], 1.0, 0.5)])
    assert values(found)["backdoor, robust: triggered"] == 4.0
    assert met(found) == {"backdoor, robust: accuracy lost": True, "backdoor, robust: triggered": True}


def test_places_are_cohorts_of_the_robust_recipe() -> None:
    edges = [edge["silos"] for edge in poisoned.robust()["edge"]]
    sits = [
        sum(any(poisoned.NAMES[number] in silos for number in numbers) for silos in edges)
        for numbers in poisoned.PLACES.values()
    ]
    assert sits == [1, 2, 3]
    assert list(map(len, poisoned.PLACES.values())) == [poisoned.SILOS // 5] * 3


def test_flower_is_compared_run_by_run() -> None:
    """Ours takes 1 s in the first round and half in later ones."""
    ours = [Sum(1.0, 1.0, 0.0, 0.0), Sum(0.5, 0.5, 0.0, 0.0)]
    runs = [(ours, Sum(9.0, seconds, 4.0 * sums.SIXTEEN_BITS, 1e-6)) for seconds in (4.0, 6.0, 20.0)]
    found = Results("name", "make bench-name")
    sums.beside(found, "sum", Graph("Flower", 17, 9), runs)
    assert values(found) == {
        "sum: faster than Flower in the first round, median": 6.0,
        "sum: faster than Flower in the first round, least": 4.0,
        "sum: faster than Flower in later rounds, median": 12.0,
        "sum: faster than Flower in later rounds, least": 8.0,
        "sum: processor time, Flower": 6.0,
        "sum: bytes a 16-bit update's, Flower": 4.0,
        "sum: largest error of the mean, Flower": 1.0,
    }
    assert list(met(found).values()) == [False, True]


def test_the_complete_graph_has_a_share_for_every_silo() -> None:
    assert (complete(50).shares, complete(50).threshold) == (50, 34)


def test_demo_means_are_over_silos_and_seeds() -> None:
    found, means = Results("name", "make bench-name"), dict[str, list[float]]()
    for seed, accuracies in ((1, (0.5, 1.0)), (2, (0.25, 0.75))):
        told = {
            "accuracy": {"alone": dict(zip("ab", accuracies, strict=True))},
            "bytes": {"up": 2_000_000, "down": 1_000_000},
            "federation_seconds": 3.0,
        }
        demo.report(found, seed, told, 1000.0 * seed, means)
    assert means == {"alone": [0.75, 0.5]}
    told = values(found)
    assert (told["seed 2: alone, b"], told["seed 1: bytes up"], told["seed 1: bytes down"]) == (0.75, 2.0, 1.0)
    assert met(found) == {"seed 1: whole demo": False, "seed 2: whole demo": False}
