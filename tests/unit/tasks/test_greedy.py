"""Greedy answers: those of transformers' ``generate`` to each prompt by itself, and no row beyond its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from isthmus.tasks.greedy import write_answers
from tests.conftest import save_tiny_model, uncut

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [5, 6, 7], [20, 21, 22, 23]]


def words(ids: list[int]) -> str:
    return " ".join(f"w{one}" for one in ids)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return uncut(save_tiny_model(request.param, tmp_path_factory.mktemp(request.param) / "model"))


def alone(model: PreTrainedModel, prompt: list[int], longest: int, ends: list[int]) -> tuple[str, bool]:
    """What ``generate`` writes after one prompt, and whether it ended by itself."""
    ids = torch.tensor([prompt])
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=ends or None,
    )[0, len(prompt) :].tolist()
    ended = written[-1] in ends
    return words(written[:-1] if ended else written), ended


@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [30, 31, 32]}]
)
def test_each_answer_is_that_of_generate(
    model: PreTrainedModel, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setattr(model.generation_config, name, value)
    free = [alone(model, prompt, 12, []) for prompt in PROMPTS]
    ends = [int(free[0][0].split()[3][1:])]
    expected = [alone(model, prompt, 12, ends) for prompt in PROMPTS]
    assert len({len(text) for text, _ in expected}) > 1, "rows end at different steps"
    found = write_answers(model, PROMPTS, words, longest=12, ends=ends)
    assert [(one.text, one.stopped) for one in found] == expected


def test_rows_that_have_ended_are_not_computed(model: PreTrainedModel) -> None:
    free = [one.text.split() for one in write_answers(model, PROMPTS, words, longest=9)]
    end = int(free[0][2][1:])
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = write_answers(model, PROMPTS, words, longest=9, ends=[end])
    hook.remove()
    lengths = [len(one.text.split()) + one.stopped for one in found]
    assert found[0].stopped
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))]


def test_an_answer_ends_before_the_first_stop_text(model: PreTrainedModel) -> None:
    free = [one.text for one in write_answers(model, PROMPTS, words, longest=8)]
    stop = " " + free[0].split()[3]
    for before, after in zip(free, write_answers(model, PROMPTS, words, longest=8, stop=["never", stop]), strict=True):
        assert after.stopped == (stop in before)
        assert after.text == before.partition(stop)[0].strip()


def test_a_stop_text_at_the_beginning_is_white_space_first(model: PreTrainedModel) -> None:
    """Of " \\n answer" the line's end before the answer is no end of it."""
    found = write_answers(model, PROMPTS[:1], lambda ids: "\n" + words(ids), longest=4, stop=["\n"])
    assert not found[0].stopped
    assert len(found[0].text.split()) == 4
