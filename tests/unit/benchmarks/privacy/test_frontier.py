"""The frontier: tuned, attacked, measured and drawn end to end with a tiny model; its noise and epsilon checked."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from benchmarks.common.rows import Rows
from benchmarks.privacy import frontier
from benchmarks.privacy.frontier_plot import draw
from benchmarks.privacy.points import DELTA, Point, classification, epsilon, generation
from benchmarks.privacy.tasks import SECTIONS, Task
from benchmarks.privacy.tuned import tuned
from isthmus.audit.capture import capture_pairs
from isthmus.audit.target import Target
from isthmus.data.tokens import Tokens
from isthmus.recipe import BoundarySection
from tests.conftest import save_tiny_model

SIZE = frontier.Size(held_out=6, victims=3, own=12, matched=2, epochs=1)
PLAIN = {path: {"noise": 0.0} for path in SECTIONS}
TEMPLATES = {
    "choose": {"prompt": "{text} w90 w91", "answer": " {label}", "choices": [" w5", " w6"]},
    "write": {"prompt": "{text} w90", "answer": " {text}"},
}


def rows(_: Path) -> tuple[Rows, Rows, Rows]:
    draw = random.Random(0)

    def some(count: int) -> Rows:
        texts = [" ".join(f"w{draw.randrange(7, 90)}" for _ in range(draw.randrange(4, 9))) for _ in range(count)]
        return [{"text": text, "label": draw.choice(["w5", "w6"])} for text in texts]

    return some(16), some(6), some(8)


def task(name: str) -> Task:
    return Task(name, rows, TEMPLATES[name], steps=2, batch=4, max_tokens=64)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # build/frontier is there, then
    return save_tiny_model("llama", tmp_path / "base")


def test_tuning_changes_the_weights_keeps_their_names_and_happens_once(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tuned(task("choose"), base)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    before, after = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (base, folder))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"} | {
        f"{name}_proj" for name in ("gate", "up", "down")
    }
    assert tuned(task("choose"), base) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["choose", "write"])
def test_points_are_attacked_measured_and_drawn(name: str, base: Path, tmp_path: Path) -> None:
    one = task(name)
    points = [Point((1, 1), "none"), Point((2, 1), "dp_gaussian", 8.0)]
    outcomes = list(frontier.measured(one, base, points, SIZE))
    clean, noised = outcomes
    kinds = {"choose": ["text"], "write": ["prompt", "response"]}[name]
    assert [list(outcome.recovered) for outcome in outcomes] == [kinds, kinds]
    assert list(clean.quality) == (["accuracy"] if name == "choose" else ["rouge1", "rougeL"])
    assert clean.recovered[kinds[0]] > noised.recovered[kinds[0]] + 0.3
    assert clean.epsilon is None
    assert noised.epsilon is not None
    assert noised.epsilon_run is not None
    assert 8.0 < noised.epsilon < noised.epsilon_run
    assert list(frontier.measured(one, base, points, SIZE)) == outcomes
    assert frontier.table(outcomes).row_count == 2
    draw(outcomes, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["gaussian", "metric"])
def test_noise_is_as_large_as_a_point_says(kind: str, base: Path) -> None:
    one, amount = task("choose"), 2.0
    tokens = [Tokens([random.Random(seed).randrange(4, 90) for _ in range(40)], [5]) for seed in range(20)]
    point = Point((1, 1), kind, amount)  # type: ignore[arg-type]
    norms_T = torch.full((800,), 10.0)
    crossed = {
        noised: torch.cat(
            [
                pair.crossing.hidden_LD
                for pair in capture_pairs(Target(one.recipe(base, (1, 1), boundary)), "west", tokens)
            ]
        )
        for noised, boundary in ((False, {}), (True, point.boundary(norms_T, 32)))
    }
    assert float(crossed[False].norm(dim=1).max()) < 10.0  # none is clipped
    deviation = float((crossed[True] - crossed[False]).std())
    assert deviation == pytest.approx(amount * 10.0 / math.sqrt(32), rel=0.03)


def test_epsilon_of_one_vector_is_what_the_point_asks_for() -> None:
    def section(kind: str, amount: float) -> BoundarySection:
        point = Point((1, 1), kind, amount)  # type: ignore[arg-type]
        return BoundarySection.model_validate(PLAIN | point.boundary(torch.full((4,), 3.0), 16))

    assert epsilon(section("dp_gaussian", 8.0), 1, 1) == pytest.approx(8.0, rel=1e-4)
    assert epsilon(section("dp_gaussian", 8.0), 3, 1) > epsilon(section("dp_gaussian", 8.0), 2, 1) > 8.0
    assert epsilon(section("gaussian", 1.0), 1, 1) == math.inf
    assert DELTA == 1e-5


def test_points_have_names_of_their_own() -> None:
    for points in (classification(), generation()):
        assert len({point.name for point in points}) == len(points)
