"""The simulated federation and its evaluator measure what its silos learned and what malicious ones sent."""

from __future__ import annotations

import random
from pathlib import Path

import dp_accounting
import pytest
import torch

from benchmarks.common.rows import Values
from benchmarks.federated.corpora import CHARACTERS, LEAST, dealt, pieces
from benchmarks.federated.evaluation import Evaluator, Score, pooled
from benchmarks.federated.pretuned import TOPICS
from benchmarks.federated.silo_privacy import DELTA, EPSILON, epsilon
from benchmarks.federated.simulation import Craft, Learned, Times, federate, merged, recipe_of
from benchmarks.federated.trials import Trial
from isthmus.model.adapters import initial_tensors
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.events import Release
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from tests.conftest import save_tiny_model, write_rows

NAMES = ("a", "b", "c")


def recipe(folder: Path, changes: Values) -> Recipe:
    model, draw = save_tiny_model("llama", folder / "model"), random.Random(0)
    rows = [{"text": " ".join(f"w{draw.randrange(4, 90)}" for _ in range(9)), "label": "w7 w8"} for _ in range(12)]
    files = {
        name: {
            key: write_rows(folder / f"{name}-{key}.jsonl", rows[at + start :][:4])
            for key, start in (("train", 0), ("held_out", 6))
        }
        for at, name in enumerate(NAMES)
    }
    sections: Values = {
        "model": {"bottom": 1, "top": 2},
        "lora": {"rank": 2},
        "train": {"rounds": 2, "steps": 2, "batch": 2, "learning_rate": 1e-2},
        "task": {"prompt": "{text}", "answer": "{label}"},
    }
    return recipe_of(model, files, merged(sections, changes))


@pytest.mark.parametrize("masks", [False, True])
def test_the_evaluator_measures_what_the_silos_do(tmp_path: Path, masks: bool) -> None:
    asked = recipe(tmp_path, {"train": {"evaluate": True}, "federation": {"secure": masks}})
    learned = federate(asked, tmp_path)
    evaluator = Evaluator(asked)
    for round in (1, 2):
        scores = evaluator.scores(learned.tensors(round))
        for name in NAMES:
            journal = read_journal(learned.run.role(name).path / "metrics.jsonl")
            own = [line["loss"] for line in journal if line["event"] == "evaluation" and line["round"] == round]
            assert own == [pytest.approx(scores[name].loss, rel=1e-5)]
    assert len(learned.times) == 2
    assert all(0 < one.side_by_side <= one.summed for one in learned.times)
    width = 2 if masks else 4
    shared = learned.run.role("root").load_round(1)["shared"]
    assert learned.update_bytes >= width * sum(tensor.numel() for tensor in shared.values())


def poisoned(folder: Path, craft: Craft) -> tuple[Learned, Recipe]:
    asked = recipe(folder, {"train": {"rounds": 1}, "federation": {"weights": "equal"}})
    return federate(asked, folder, malicious=["c"], craft=craft), asked


def test_a_malicious_silo_knows_what_the_others_send(tmp_path: Path) -> None:
    """One that sends the honest silos' sum backwards keeps the shared adapters where they were."""
    learned, asked = poisoned(tmp_path, lambda own_P, honest_HP, malicious: -malicious * honest_HP.sum(dim=0))
    start = initial_tensors(Checkpoint(asked.model.path).config, asked)
    shared = learned.run.role("root").load_round(1)["shared"]
    assert shared
    for name, tensor in shared.items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=1e-7)


def test_rounds_and_seconds_to_a_loss() -> None:
    scores = {round: {"a": Score(loss, 0.5, 10)} for round, loss in ((2, 3.0), (4, 2.0))}
    trial = Trial(scores, tuple(Times(seconds, 2 * seconds) for seconds in (1.0, 2.0, 3.0, 4.0)), 0.0)
    assert trial.rounds_to(3.5) == 2
    assert trial.rounds_to(2.5) == 3
    assert trial.rounds_to(1.0) == float("inf")
    assert trial.seconds(2.5) == 4.5
    assert trial.seconds(4, summed=True) == 20
    assert trial.seconds(float("inf")) == float("inf")


def test_scores_are_pooled_by_tokens() -> None:
    assert pooled([Score(1.0, 1.0, 1), Score(2.0, 0.0, 3)]) == Score(1.75, 0.25, 4)


def test_lines_are_cut_into_pieces() -> None:
    lines = ["x" * 60, "y" * 60, "z" * 200, "end"]
    found = pieces("\n".join(lines))
    assert found[:2] == lines[:2]
    assert all(LEAST <= len(piece) <= CHARACTERS for piece in found)


def test_rows_are_dealt_once() -> None:
    pool = {topic: [{"text": f"{topic} {number}"} for number in range(10)] for topic in TOPICS}
    taken = dealt(random.Random(0), pool, [1.0, 0, 0, 0, 0], 30)
    assert len({row["text"] for row in taken}) == 30
    assert sum(row["text"].startswith(TOPICS[0]) for row in taken) == 10


def test_epsilon_follows_from_clip_and_noise_alone() -> None:
    noise = float(dp_accounting.get_sigma_gaussian(EPSILON, DELTA)) * 5**0.5
    rounds = [Release("update", round, 1, 10, clip=0.5, noise=noise, size=1) for round in range(5)]
    assert epsilon(rounds) == pytest.approx(EPSILON, abs=1e-3)
