"""Steps of several generations: one that fails ends alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList

from isthmus.errors import BudgetExhausted, PeerGoneError
from isthmus.gateway.generation import Generation, GenerationRequest
from isthmus.gateway.sampling import SamplingSettings
from isthmus.gateway.steps import GatewaySteps
from isthmus.model.split import SplitForCausalLM
from isthmus.privacy.budget import Budget
from isthmus.recipe import PrivacySection
from tests.conftest import Split, make_recipe, save_tiny_model
from tests.integration.gateways import DP
from tests.oracle.gateway import Collected, words

GREEDY = SamplingSettings(temperature=0.0)


def started(prompt: list[int], longest: int = 8) -> tuple[Generation, Collected]:
    sink = Collected()
    request = GenerationRequest(prompt, longest, settings=GREEDY)
    return Generation(request, sink, words, LogitsProcessorList()), sink


def stepped(steps: GatewaySteps, running: list[Generation]) -> None:
    steps.send(running)
    left = [one for one in running if not one.ended]
    for one in left:
        assert one.step is not None
        one.step.sent.answer.exception()  # waits
    if left:
        steps.receive(left)


def run(model: SplitForCausalLM, *running: Generation) -> None:
    steps = GatewaySteps(model)
    while left := [one for one in running if not one.ended]:
        stepped(steps, left)


def test_a_record_whose_budget_is_spent_ends_alone(split: Split, tmp_path: Path) -> None:
    """Nothing of it leaves any more; what had left is charged."""
    recipe = make_recipe(
        save_tiny_model("llama", tmp_path / "model"),
        boundary={"forward": DP, "gradient": DP},
        privacy={"record_epsilon": 4.0, "delta": 1e-5},
    )
    model, _ = split(recipe, budget=Budget(PrivacySection(record_epsilon=4.0, delta=1e-5)))
    (long, told), (short, other) = started([4, 5, 6], 40), started([7, 8], 3)
    run(model, long, short)
    assert told.end is not None
    assert isinstance(told.end.error, BudgetExhausted)
    assert other.end is not None
    assert (other.end.error, len(other.ids[0])) == (None, 3)
    left = len(told.end.releases)
    assert 3 < left < 40
    assert left == told.end.written
    assert len(list(model.boundary.ledger.history())) == left + 3


def test_a_choice_that_nobody_expected_to_fail_ends_its_generation_alone(
    split: Split, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = split(make_recipe(save_tiny_model("llama", tmp_path / "model")))
    (one, told), (other, whole) = started([4, 5]), started([6])

    def fail(logits_V: torch.Tensor) -> int:
        raise ValueError("a text that a patient wrote")

    one.rows[0].choose = fail  # type: ignore[method-assign]
    run(model, one, other)
    assert told.end is not None
    assert "ValueError" in str(told.end.error)
    assert len(told.end.releases) == 1
    assert (whole.finishes, len(whole.ids[0])) == (["length"], 8)
    assert "patient" not in caplog.text


def test_without_a_trunk_each_ends_and_the_connection_is_lost(split: Split, tmp_path: Path) -> None:
    model, _ = split(make_recipe(save_tiny_model("llama", tmp_path / "model")))
    steps = GatewaySteps(model)
    (one, told), (other, silent) = started([4, 5]), started([6])
    stepped(steps, [one])
    assert not steps.lost()

    def gone(request: object) -> object:
        raise PeerGoneError("gone", remedy="wait")

    model.trunk.channel.submit = gone  # type: ignore[method-assign, assignment, union-attr]
    stepped(steps, [one, other])
    for sink in (told, silent):
        assert sink.end is not None
        assert isinstance(sink.end.error, PeerGoneError)
    assert len(told.end.releases) == 2  # type: ignore[union-attr]
    assert steps.lost()
