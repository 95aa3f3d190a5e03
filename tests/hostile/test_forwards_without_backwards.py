"""Training forwards that are never followed by a backward: their bytes are bounded, and others' steps are the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus.errors import ProtocolError
from isthmus.trunk.training import OPEN_STEPS
from tests.conftest import save_tiny_model
from tests.unit.trunk.drill import Drill, decoded, recipe_of, results
from tests.unit.trunk.talk import WAIT

LIMIT = 2_000_000
WORK = (1, (40, 24))
NAMES = ("good", "greedy")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture
def drill(model: Path, tmp_path: Path) -> Iterator[Drill]:
    made = drill_of(model, tmp_path, LIMIT)
    yield made
    made.service.stop()


def drill_of(model: Path, folder: Path, limit: int) -> Drill:
    drill = Drill(recipe_of(model, silos=NAMES, train={}, gather=0.0, stash_bytes=limit), folder)
    drill.begin(names=NAMES)
    return drill


def flood(drill: Drill) -> None:
    """As many forwards of the greedy silo as it may have open."""
    for _ in range(OPEN_STEPS):
        decoded(drill.silos["greedy"].forward(WORK))
        assert drill.service._training.stashed_bytes <= LIMIT


def test_bytes_stay_below_the_limit_and_a_good_silos_step_is_the_same(
    drill: Drill, model: Path, tmp_path: Path
) -> None:
    good = drill.silos["good"]
    alone = drill_of(model, tmp_path / "alone", LIMIT)
    expected = [step(alone, "good"), step(alone, "good")]
    alone.service.stop()
    first = good.forward(WORK)
    decoded(first)
    flood(drill)
    assert drill.service._training.partners("good", good.last) == 1
    assert drill.service._training.pass_of("good", good.last).nbytes > 0, "within its share it loses nothing"  # type: ignore[union-attr]
    passes = len(drill.passes)
    gradient = decoded(good.backward(good.last, WORK))
    assert len(drill.passes) == passes, "and nothing is computed again"
    torch.testing.assert_close(gradient, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(step(drill, "good"), expected[1], rtol=0, atol=1e-5)


def test_a_graph_that_was_dropped_is_computed_again(drill: Drill, model: Path, tmp_path: Path) -> None:
    alone = drill_of(model, tmp_path / "alone", 2**30)
    expected = step(alone, "greedy")
    alone.service.stop()
    greedy = drill.silos["greedy"]
    flood(drill)
    assert drill.service._training.pass_of("greedy", 1).nbytes == 0  # type: ignore[union-attr]
    torch.testing.assert_close(decoded(greedy.backward(1, WORK)), expected, rtol=0, atol=1e-5)


def test_inputs_count_and_what_exceeds_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    drill = drill_of(model, tmp_path, 100_000)
    good, greedy = drill.silos["good"], drill.silos["greedy"]
    answers = [greedy.forward(WORK) for _ in range(OPEN_STEPS)]
    refused = [error for answer in answers if (error := answer.exception(WAIT)) is not None]
    assert len(refused) == OPEN_STEPS - 50_000 // (64 * 32 * 4)
    for error in refused:
        assert isinstance(error, ProtocolError)
        assert "trunk.stash_bytes" in error.message
        assert "smaller batches" in error.remedy
    assert drill.service._training.stashed_bytes <= 100_000
    decoded(good.forward(WORK))
    decoded(good.backward(good.last, WORK))
    decoded(greedy.backward(1, WORK))
    decoded(greedy.forward(WORK))
    drill.service.stop()


def test_nothing_is_left_of_a_process_that_another_replaces(drill: Drill) -> None:
    flood(drill)
    assert drill.service._training.stashed_bytes > 0
    drill.service._scheduler.submit(lambda: drill.service._forget("greedy")).result(WAIT)
    assert drill.service._training.stashed_bytes == 0


def step(drill: Drill, name: str) -> torch.Tensor:
    silo = drill.silos[name]
    results([silo.forward(WORK)])
    gradient = decoded(silo.backward(silo.last, WORK))
    assert gradient is not None
    return gradient
