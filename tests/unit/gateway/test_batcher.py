"""Who runs, who waits, who is turned away, and what ends it all."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.errors import BusyError, IsthmusError, PeerGoneError
from isthmus.gateway.batcher import Batcher
from isthmus.gateway.generation import GenerationRequest
from isthmus.gateway.sampling import SamplingSettings
from isthmus.gateway.steps import GatewaySteps
from isthmus.model.split import SplitForCausalLM
from tests.conftest import Split, make_recipe, save_tiny_model
from tests.oracle.gateway import Collected, batching, words, written

LONG = GenerationRequest([4, 5], 500, settings=SamplingSettings(temperature=0.0))
SHORT = GenerationRequest([4, 5], 3, settings=SamplingSettings(temperature=0.0))


@pytest.fixture
def model(split: Split, tmp_path: Path) -> SplitForCausalLM:
    return split(make_recipe(save_tiny_model("llama", tmp_path / "model")))[0]


def test_those_that_wait_are_bounded(model: SplitForCausalLM) -> None:
    with batching(model, together=2, waiting=1) as batcher:
        sinks = [Collected() for _ in range(3)]
        running = [batcher.submit(LONG, sink) for sink in sinks]
        assert all(sink.begun.wait(60) for sink in sinks[:2])
        with pytest.raises(BusyError, match="wait already"):
            batcher.submit(SHORT, Collected())
        assert batcher.load == (2, 1)
        for one in running:
            batcher.cancel(one)
        assert all(sink.wait().error is None for sink in sinks)
        assert written(batcher, [SHORT])[0].finishes == ["length"]
        assert not sinks[2].pieces


def test_nobody_waits_where_none_may(model: SplitForCausalLM) -> None:
    with batching(model, together=1, waiting=0) as batcher:
        assert [written(batcher, [SHORT])[0].finishes for _ in range(3)] == [["length"]] * 3


def test_more_answers_than_fit_run_alone(model: SplitForCausalLM) -> None:
    """Several short ones take turns with them."""
    with batching(model, together=2) as batcher:
        wide = GenerationRequest([4, 5], 5, answers=3, settings=SamplingSettings(seed=1))
        found = written(batcher, [SHORT, wide, SHORT, wide])
    assert found[1].ids == found[3].ids
    assert [len(one.ids) for one in found] == [1, 3, 1, 3]


def test_what_is_under_way_ends_with_it(model: SplitForCausalLM) -> None:
    sink = Collected()
    with batching(model) as batcher:
        batcher.submit(LONG, sink)
        assert sink.begun.wait(60)
    assert isinstance(sink.wait().error, BusyError)
    with pytest.raises(PeerGoneError):
        batcher.submit(SHORT, Collected())


def test_before_it_runs_nothing_is_taken() -> None:
    with pytest.raises(PeerGoneError, match="no connection"):
        Batcher(words).submit(SHORT, Collected())


def test_a_step_that_nobody_expected_to_fail_ends_its_generations(
    model: SplitForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with batching(model) as batcher:
        with monkeypatch.context() as patched:

            def fail(self: object, generations: object) -> None:
                raise ValueError("a text that a patient wrote")

            patched.setattr(GatewaySteps, "receive", fail)
            sink = Collected()
            batcher.submit(SHORT, sink)
            error = sink.wait().error
        assert isinstance(error, IsthmusError)
        assert "ValueError" in error.message
        assert written(batcher, [SHORT])[0].finishes == ["length"]
    assert "patient" not in caplog.text + str(error)
