"""Scores with a prompt's shared cache equal those of whole texts, one at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from isthmus.tasks import scoring
from isthmus.tasks.scoring import ChoiceQuestion, best_choices, choice_log_probs
from tests.conftest import VOCABULARY, save_tiny_model

FAMILIES = {"llama": {}, "mistral": {"sliding_window": 8}}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = tmp_path_factory.mktemp(request.param)
    path: Path = save_tiny_model(request.param, folder, initializer_range=0.5, **FAMILIES[request.param])
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path)
    return found.eval()


def questions(seed: int, count: int, *, longest: int = 5, choices: int = 6) -> list[ChoiceQuestion]:
    draw = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [draw.randrange(4, VOCABULARY) for _ in range(draw.randint(1, most))]

    return [
        ChoiceQuestion(tokens(20), [tokens(longest) for _ in range(draw.randint(1, choices))]) for _ in range(count)
    ]


@torch.no_grad()
def one_at_a_time(model: PreTrainedModel, asked: list[ChoiceQuestion]) -> list[list[float]]:
    """The plain way: each prompt with each choice, whole."""
    return [[_total(model, one.prompt, choice) for choice in one.choices] for one in asked]


def _total(model: PreTrainedModel, prompt: list[int], choice: list[int]) -> float:
    logits_LV = model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0].log_softmax(dim=-1)
    return sum(float(logits_LV[len(prompt) + at - 1, token]) for at, token in enumerate(choice))


@pytest.mark.parametrize("logits", [scoring.SCORED_LOGITS, 12 * VOCABULARY])
@pytest.mark.parametrize("room", [8192, 150, 20])
def test_they_equal_whole_texts_however_much_fits(
    model: PreTrainedModel, room: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SCORED_TOKENS", room)
    monkeypatch.setattr(scoring, "SCORED_LOGITS", logits)
    asked = questions(room, 12)
    found = choice_log_probs(model, asked)
    for scores, expected in zip(found, one_at_a_time(model, asked), strict=True):
        assert scores == pytest.approx(expected, abs=1e-4)


def test_choices_of_one_token_need_one_pass(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = questions(1, 8, longest=1)
    expected = one_at_a_time(model, asked)
    passes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **more: (passes.append(0), forward(*args, **more))[1])
    found = choice_log_probs(model, asked)
    assert len(passes) == 1
    for scores, wanted in zip(found, expected, strict=True):
        assert scores == pytest.approx(wanted, abs=1e-4)


def test_nothing_is_asked_of_no_questions(model: PreTrainedModel) -> None:
    assert choice_log_probs(model, []) == []


def test_the_likeliest_choice_by_each_ranking() -> None:
    log_probs, texts, alone = [[-4.0, -5.0]], [[" no", " certainly"]], [[-1.0, -8.0]]
    assert best_choices(log_probs, texts, "total") == [0]
    assert best_choices(log_probs, texts, "length") == [1]
    assert best_choices(log_probs, texts, "unconditioned", alone) == [1]
    assert best_choices([[-1.0, -1.0]], [["a", "b"]], "total") == [0], "of several the first"
