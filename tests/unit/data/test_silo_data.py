"""A silo's rows in tokens: training, held out, choices, and what the model reads to score one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Tokens
from isthmus.errors import DataError
from isthmus.privacy.sensitivity import Sensitivity
from tests.conftest import make_recipe, save_tiny_tokenizer, write_rows

ROWS = [{"text": "w5 w6", "label": "w7"}, {"text": "w8", "label": "w9"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def data_of(folder: Path, tokenizer: PreTrainedTokenizerFast, *, held_out: bool = False, **task: Any) -> SiloData:
    path = str(write_rows(folder / "rows.jsonl", ROWS))
    silo = {"name": "a", "train": path, **({"held_out": path} if held_out else {})}
    recipe = make_recipe(Path("none"), silo=[silo], task={"prompt": "{text}", "answer": "{label}", **task})
    return SiloData(recipe.silo[0], recipe, tokenizer)


def test_rows_are_read_and_free_text_is_closed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = data_of(tmp_path, tokenizer)
    assert [(row.prompt, row.answer) for row in data.train] == [([5, 6], [7, 2]), ([8], [9, 2])]
    assert (data.name, data.held_out, data.choices, data.pad) == ("a", [], [], 0)
    assert data.evaluation_inputs(data.train[0]) == [data.train[0]]


def test_choices_are_not_closed_and_one_token_needs_the_prompt_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = data_of(tmp_path, tokenizer, held_out=True, choices=["w7", "w9"])
    assert data.choices == [(7,), (9,)]
    assert [row.answer for row in data.held_out] == [[7], [9]]
    assert data.evaluation_inputs(data.held_out[0]) == [Tokens([5, 6], [])]


def test_longer_choices_are_read_with_the_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = data_of(tmp_path, tokenizer, answer="{label} w4", choices=["w7 w4", "w9 w4"])
    assert data.evaluation_inputs(data.train[0]) == [Tokens([5, 6], [7, 4]), Tokens([5, 6], [9, 4])]


def test_shorter_choices_are_filled_up(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = data_of(tmp_path, tokenizer, held_out=True, choices=["w7", "w9", "w5 w4 w8"])
    assert data.train == data.held_out == [Tokens([5, 6], [7], filler=(0, 0)), Tokens([8], [9], filler=(0, 0))]
    assert data.evaluation_inputs(data.train[0]) == [Tokens([5, 6], list(choice)) for choice in data.choices]


def test_choices_that_begin_alike_end_with_the_end_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = data_of(tmp_path, tokenizer, choices=["w7", "w9", "w9 w4"])
    assert data.choices == [(7, 2), (9, 2), (9, 4, 2)]
    assert data.train == [Tokens([5, 6], [7, 2], filler=(0,)), Tokens([8], [9, 2], filler=(0,))]
    assert [one.answer for one in data.evaluation_inputs(data.train[0])] == [[7, 2], [9, 2], [9, 4, 2]]


def test_a_space_at_the_end_of_the_prompts_template_is_the_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = data_of(tmp_path, tokenizer, prompt="{text}: ", choices=["w7", "w9"])
    assert (data.choices, data.train[0]) == ([(7,), (9,)], Tokens([5, 3], [7]))
    assert [example.answer for _, example in data.sets[0].texts] == [" w7", " w9"]


@pytest.mark.parametrize(("choices", "error"), [(["w7", " w7"], "same tokens"), (["w7", " "], "no token")])
def test_choices_that_cannot_be_told_apart_are_refused(
    choices: list[str], error: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=error) as caught:
        data_of(tmp_path, tokenizer, choices=choices)
    assert "task.choices" in caught.value.remedy


def test_a_rows_classes_are_those_of_the_worst_choice(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    names = tmp_path / "names.txt"
    names.write_text("w4\n")
    section = {"detectors": {"name": "high"}, "names": str(names), "classes": {"high": {"noise": 2.0}}}
    path = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    task = {"prompt": "{text}", "answer": " {label}", "choices": [" w7", " w9", " w5 w4 w8"]}
    recipe = make_recipe(Path("none"), silo=[{"name": "a", "train": path}], task=task, sensitivity=section)
    assert recipe.sensitivity is not None
    data = SiloData(recipe.silo[0], recipe, tokenizer, Sensitivity(recipe.sensitivity))
    assert [row.classes for row in data.train] == [(0, 0, 1), (0, 1)]
    first, *_, last = data.known_rows()
    assert first == data.train[0]
    assert last == Tokens([8], [5, 4, 8], (0, 1, 1, 1))
    assert len(data.known_rows()) == 6


def test_an_answer_that_is_no_choice_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="w9"):
        data_of(tmp_path, tokenizer, choices=["w7", "w8"])


@pytest.mark.parametrize("epochs", [1, 3])
def test_passes_draw_every_row_as_often_over_all_rounds(
    epochs: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"text": f"w{4 + number}", "label": "w9"} for number in range(7)]
    silo = {"name": "a", "train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    task = {"prompt": "{text}", "answer": "{label}"}
    recipe = make_recipe(Path("none"), silo=[silo], task=task, train={"epochs": epochs, "batch": 2, "rounds": 2})
    data = SiloData(recipe.silo[0], recipe, tokenizer)
    drawn = [batch for round in (1, 2) for batch in data.round_batches(round)]
    passes = [drawn[start : start + 4] for start in range(0, len(drawn), 4)]
    assert [list(map(len, one)) for one in passes] == [[2, 2, 2, 1]] * epochs
    for one in passes:
        assert sorted(row.prompt for batch in one for row in batch) == sorted(row.prompt for row in data.train)
    assert epochs == 1 or passes[0] != passes[1]
    assert data.round_batches(2) == drawn[2 * epochs :]


def test_a_round_without_a_step_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    silo = {"name": "a", "train": str(write_rows(tmp_path / "rows.jsonl", ROWS))}
    task = {"prompt": "{text}", "answer": "{label}"}
    recipe = make_recipe(Path("none"), silo=[silo], task=task, train={"epochs": 1, "batch": 2, "rounds": 3})
    with pytest.raises(DataError, match="fewer than the 3 rounds") as caught:
        SiloData(recipe.silo[0], recipe, tokenizer).round_batches(1)
    assert "lower train.rounds" in caught.value.remedy


@pytest.mark.parametrize(("train", "own"), [({"most_rows": 2}, {}), ({"most_rows": 9}, {"most_rows": 2})])
def test_more_rows_than_the_recipe_lets_a_silo_have_are_named(
    train: dict[str, int], own: dict[str, int], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"text": f"w{4 + number}", "label": "w9"} for number in range(3)]
    silo = {"name": "a", "train": str(write_rows(tmp_path / "rows.jsonl", rows)), **own}
    task = {"prompt": "{text}", "answer": "{label}"}
    recipe = make_recipe(Path("none"), silo=[silo], task=task, train={"epochs": 1, "batch": 2, "rounds": 1, **train})
    with pytest.raises(DataError, match="a has 3 training rows; by the recipe it may have 2") as caught:
        SiloData(recipe.silo[0], recipe, tokenizer)
    assert "most_rows" in caught.value.remedy


def test_what_becomes_of_long_rows_is_said_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    silo = {"name": "a", "train": str(write_rows(tmp_path / "rows.jsonl", ROWS))}
    task = {"prompt": "{text}", "answer": "{label}"}

    def read(**train: Any) -> SiloData:
        recipe = make_recipe(Path("none"), silo=[silo], task=task, train=train)
        return SiloData(recipe.silo[0], recipe, tokenizer)

    assert len(read(max_tokens=3, long_rows="skip").train) == 1
    assert caplog.messages == ["a: training (train.max_tokens = 3): of 2 rows 1 are skipped"]
    caplog.clear()
    assert read(max_tokens=3).train[0].prompt == [6]
    assert caplog.messages == ["a: training (train.max_tokens = 3): of 2 rows 1 lose a part of their prompt"]
    with pytest.raises(DataError, match=r"rows\.jsonl:1 has 4 tokens"):
        read(max_tokens=3, long_rows="refuse")
    with pytest.raises(DataError, match="every training row of a is longer") as caught:
        read(max_tokens=2, long_rows="skip")
    assert "truncate" in caught.value.remedy


@pytest.mark.parametrize(("rounds", "steps"), [(12, 1), (4, 3), (3, 4), (1, 12)])
def test_rounds_go_on_where_the_last_one_stopped(
    rounds: int, steps: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """However the steps are divided into rounds, the batches are the same, and no row comes again before all have."""
    rows = [{"text": f"w{4 + number}", "label": "w9"} for number in range(8)]
    silo = {"name": "a", "train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    task = {"prompt": "{text}", "answer": "{label}"}
    train = {"batch": 2, "rounds": rounds, "steps": steps}
    data = SiloData(*(recipe := make_recipe(Path("none"), silo=[silo], task=task, train=train)).silo, recipe, tokenizer)
    drawn = [row.prompt[0] for round in range(1, rounds + 1) for batch in data.round_batches(round) for row in batch]
    passes = [drawn[start : start + 8] for start in (0, 8, 16)]
    assert [sorted(one) for one in passes] == [sorted(drawn[:8])] * 3
    assert len({tuple(one) for one in passes}) > 1
    whole = make_recipe(Path("none"), silo=[silo], task=task, train={"batch": 2, "rounds": 1, "steps": 12})
    (at_once,) = [SiloData(whole.silo[0], whole, tokenizer)]
    assert drawn == [row.prompt[0] for batch in at_once.round_batches(1) for row in batch]


@pytest.mark.parametrize(("most", "count"), [(None, 9), (3, 3), (9, 9), (20, 9)])
def test_evaluations_read_the_same_rows_each_time(
    most: int | None, count: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"text": f"w{4 + number}", "label": "w9"} for number in range(9)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    silo = {"name": "a", "train": path, "held_out": path}
    train = {"evaluate_rows": most} if most else {}
    recipe = make_recipe(Path("none"), silo=[silo], task={"prompt": "{text}", "answer": "{label}"}, train=train)
    first, again = (SiloData(recipe.silo[0], recipe, tokenizer).measured_rows() for _ in range(2))
    assert first == again
    assert len({tuple(row.prompt) for row in first}) == count
