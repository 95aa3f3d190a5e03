"""A silo's rows: tokens, batches, order, the loss on them, and the two ways to score choices."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from isthmus.data.encoding import TextEncoder
from isthmus.data.silo_data import SiloData
from isthmus.data.templates import Example
from isthmus.data.tokens import IGNORED, Tokens, batches, collate, positions, tokenize
from isthmus.errors import DataError
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import Recipe, SensitivityClass, SensitivitySection
from isthmus.recipe.sections.task import Truncation
from isthmus.silo import trainer
from isthmus.silo.join import load_tokenizer
from isthmus.silo.trainer import evaluate, train_step
from tests.conftest import make_recipe, save_tiny_model, uncut, write_rows
from tests.unit.data.readers import unigram

IDS = st.lists(st.integers(3, 96), min_size=1, max_size=6)
FILLER = st.lists(st.just(1), max_size=3).map(tuple)
ROWS = st.lists(st.builds(Tokens, IDS, IDS, st.none(), FILLER), min_size=1, max_size=5)
EOS = 2
CHOICES = ("w9", "w10 w11 w12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return uncut(folder)


def tokens_of(folder: Path, prompt: str, answer: str, most: int = 9, *, free: bool = False) -> Tokens:
    return tokenize([Example(prompt, answer)], load_tokenizer(folder), most, free_text=free)[0]


def silo_data(folder: Path, tmp_path: Path, choices: tuple[str, ...] = ()) -> SiloData:
    """Held-out rows of growing length, each answered by one of the choices or by free text."""
    answers = choices or ("w7 w8", "w9", "w4 w5 w6")
    rows = [
        {
            "prompt": " ".join(f"w{4 + (7 * n + i * i) % 90}" for i in range(1 + n % 6)),
            "answer": answers[n % len(answers)],
        }
        for n in range(23)
    ]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    silo = {"name": "a", "train": path, "held_out": path}
    recipe: Recipe = make_recipe(folder, task={"choices": list(choices)}, silo=[silo])
    return SiloData(recipe.party("a"), recipe, load_tokenizer(folder))


def test_a_long_prompt_loses_its_beginning(folder: Path) -> None:
    assert tokens_of(folder, "w4 w5 w6 w7 w8", "w9 w10", 5) == Tokens([6, 7, 8], [9, 10])
    assert tokens_of(folder, "w4 w5", "w9", 3) == Tokens([4, 5], [9])


@pytest.mark.parametrize(("most", "room"), [(8, 6), (7, 5), (5, 3), (4, 2)])
def test_a_long_prompt_loses_its_front_or_middle_but_not_its_beginning(most: int, room: int) -> None:
    tokenizer, example = unigram(), Example("she is happy and no one knows", " no")
    whole, answer = TextEncoder(tokenizer).prompt(example.prompt).ids, 2
    assert len(TextEncoder(tokenizer).answer(" no").ids) == 1

    def read(truncate: Truncation) -> list[int]:
        (row,) = tokenize([example], tokenizer, most, free_text=True, truncate=truncate)
        assert len(row.prompt) == room == most - answer
        return row.prompt

    assert read("front") == [whole[0], *whole[len(whole) - room + 1 :]]
    half = max(1, room // 2)
    assert read("middle") == [*whole[:half], *whole[len(whole) - room + half :]]
    with pytest.raises(DataError, match="2 answer tokens"):
        tokenize([example], tokenizer, 3, free_text=True)  # the beginning alone is no prompt


def test_places_of_fields_keep_their_classes_in_a_shortened_prompt() -> None:
    tokenizer, text = unigram(), "she is happy and no one"
    section = SensitivitySection(detectors={}, fields={}, classes={"high": SensitivityClass(noise=2.0)})
    example = Example(text, " no", ((text.index("one"), text.index("one") + 3, "high"),))
    for truncate in ("front", "middle"):
        (row,) = tokenize([example], tokenizer, 7, free_text=True, sensitivity=Sensitivity(section), truncate=truncate)
        assert row.classes is not None
        ids = [number for number, kind in zip(row.prompt + row.answer, row.classes, strict=True) if kind]
        assert tokenizer.decode(ids).split() == ["one"]


def test_an_answer_beside_the_choices_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="is no choice"):
        tokenize([Example("w4", "w5")], load_tokenizer(folder), 9, free_text=False, choices=CHOICES)


def test_answers_are_filled_up_and_prompts_cut_alike(folder: Path) -> None:
    examples = [Example("w4 w5 w6 w7 w8", "w9"), Example("w4 w5 w6 w7 w8", "w10 w11 w12")]
    short, long = tokenize(examples, load_tokenizer(folder), 6, free_text=False, choices=CHOICES, pad=1)
    assert short == Tokens([6, 7, 8], [9], filler=(1, 1))
    assert long == Tokens([6, 7, 8], [10, 11, 12])
    assert (short.input, long.input) == ([6, 7, 8, 1, 1], [6, 7, 8, 10, 11])
    assert [row.crossing(tail) for row in (short, long) for tail in (None, 1)] == [5, 3] * 2
    with pytest.raises(DataError, match="3 answer tokens"):
        tokenize(examples[:1], load_tokenizer(folder), 3, free_text=False, choices=CHOICES)


def test_filler_has_the_class_of_the_answers_last_token() -> None:
    assert Tokens([5, 6], [7, 8], (0, 1, 2, 3), (9,)).input_classes == (0, 1, 2, 3)
    assert Tokens([5, 6], [7], (0, 1, 2), (9, 9)).input_classes == (0, 1, 2, 2)
    assert Tokens([5, 6], [7, 8], (0, 1, 2, 3)).input_classes == (0, 1, 2)
    assert Tokens([5, 6], [7]).input_classes == ()


def test_free_text_ends_with_the_end_token_within_the_limit(folder: Path) -> None:
    assert tokens_of(folder, "w4 w5 w6", "w9", 4, free=True) == Tokens([5, 6], [9, EOS])


@pytest.mark.parametrize(
    ("prompt", "answer", "most", "free"),
    [("w4", "w5 w6 w7", 3, False), ("w4", "w5 w6", 3, True), ("", "w5", 9, False), ("w4", "", 9, False)],
)
def test_rows_that_cannot_be_used(folder: Path, prompt: str, answer: str, most: int, free: bool) -> None:
    with pytest.raises(DataError, match=r"prompt and .* answer tokens") as caught:
        tokens_of(folder, prompt, answer, most, free=free)
    assert caught.value.remedy


@settings(derandomize=True, deadline=None)
@given(ROWS)
def test_collate_pads_on_the_left_and_keeps_the_last_answer_token_as_a_target(rows: list[Tokens]) -> None:
    batch = collate(rows, 0)
    keep = batch.targets.shape[1]
    assert keep == max(len(row.answer) + len(row.filler) for row in rows)
    for row, ids, mask, place, targets in zip(
        rows, batch.input_ids, batch.attention_mask, batch.position_ids, batch.targets, strict=True
    ):
        whole = row.prompt + row.answer[:-1] + list(row.filler)
        blank = len(ids) - len(whole)
        assert ids.tolist() == [0] * blank + whole
        assert mask.tolist() == [0] * blank + [1] * len(whole)
        assert place.tolist() == [0] * blank + list(range(len(whole)))
        before = keep - len(row.answer) - len(row.filler)
        assert targets.tolist() == [IGNORED] * before + row.answer + [IGNORED] * len(row.filler)
    assert batch.supervised == sum(len(row.answer) for row in rows)
    assert batch.tokens == sum(len(row.input) for row in rows)
    assert batch.weight == sum(len(row.answer) + len(row.filler) for row in rows)
    assert sum(part.weight for part in batch.parts(2)) == batch.weight


def test_positions_of_any_mask() -> None:
    assert positions(torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 1, 2]]


def test_a_prompt_without_an_answer_is_all_input() -> None:
    batch = collate([Tokens([5, 6, 7], []), Tokens([8], [])], 0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.targets.tolist() == [[IGNORED]] * 2


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.text(max_size=5))
def test_batches_give_every_row_once_a_pass(count: int, size: int, seed: str) -> None:
    rows = [Tokens([number], [number]) for number in range(count)]
    drawn = list(itertools.islice(batches(rows, size, seed), count))
    flat = [row.prompt[0] for batch in drawn for row in batch]
    assert all(len(batch) == size for batch in drawn)
    for start in range(0, len(flat), count):
        assert Counter(flat[start : start + count]) == Counter(range(count))
    assert drawn == list(itertools.islice(batches(rows, size, seed), count))


def test_another_seed_gives_another_order() -> None:
    rows = [Tokens([number], [number]) for number in range(50)]
    assert next(batches(rows, 50, "0/a/1")) != next(batches(rows, 50, "0/a/2")) != rows


def log_probabilities(model: PreTrainedModel, row: Tokens) -> torch.Tensor:
    """Of each answer token, one row at a time, without padding."""
    ids = torch.tensor([row.prompt + row.answer])
    logs = model(input_ids=ids).logits[0].log_softmax(dim=-1)
    first = len(row.prompt)
    return torch.stack([logs[first + n - 1, token] for n, token in enumerate(row.answer)])


@torch.no_grad()
def test_loss_of_a_batch_is_the_mean_over_its_answer_tokens(model: PreTrainedModel) -> None:
    rows = [Tokens([5, 6, 7, 8], [9]), Tokens([10], [11, 12, 13]), Tokens([14, 15], [16, 2])]
    manual = -torch.cat([log_probabilities(model, row) for row in rows]).mean()
    assert float(model(**collate(rows, 0).inputs()).loss) == pytest.approx(float(manual), rel=1e-5)
    filled = [replace(row, filler=(0,) * (3 - len(row.answer))) for row in rows]
    assert float(model(**collate(filled, 0).inputs()).loss) == pytest.approx(float(manual) * 6 / 9, rel=1e-5)


def test_a_train_step_reports_and_steps(folder: Path) -> None:
    model = uncut(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = collate([Tokens([5, 6], [7, 8]), Tokens([9], [10])], 0)
    steps = [train_step(model, optimizer, batch) for _ in range(2)]
    assert [(step.weight, step.tokens) for step in steps] == [(3, 4)] * 2
    assert steps[1].loss < steps[0].loss


@pytest.mark.parametrize("size", [1, 4, 16])
def test_evaluate_free_text(model: PreTrainedModel, folder: Path, tmp_path: Path, size: int) -> None:
    data = silo_data(folder, tmp_path)
    with torch.no_grad():
        manual = -float(torch.cat([log_probabilities(model, row) for row in data.held_out]).mean())
    scores = evaluate(model, data, size=size)
    assert scores == pytest.approx({"loss": manual, "perplexity": math.exp(manual)}, rel=1e-4)


def slow_choices(model: PreTrainedModel, data: SiloData) -> list[tuple[int, ...]]:
    """The likeliest choice of each held-out row, one at a time."""
    return [
        max(data.choices, key=lambda choice: float(log_probabilities(model, Tokens(row.prompt, list(choice))).sum()))
        for row in data.held_out
    ]


@pytest.mark.parametrize("choices", [("w30", "w31", "w32"), ("w30 w31", "w32 w40", "w33 w34 w35")])
@torch.no_grad()
def test_evaluate_choices(model: PreTrainedModel, folder: Path, tmp_path: Path, choices: tuple[str, ...]) -> None:
    data = silo_data(folder, tmp_path, choices)
    best = slow_choices(model, data)
    right = [tuple(row.answer) for row in data.held_out]
    share = sum(map(tuple.__eq__, best, right)) / len(right)
    assert len(set(best)) > 1
    assert evaluate(model, data, size=5) == {"accuracy": share}


@torch.no_grad()
def test_one_token_scoring_equals_text_scoring(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    data = silo_data(folder, tmp_path, ("w30", "w31", "w32"))
    assert trainer._best_token(model, data, data.held_out) == trainer._best_text(model, data, data.held_out, 4)


def test_evaluate_on_the_split_model_equals_the_uncut(split, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for choices in ((), ("w30", "w31")):
        data = silo_data(folder, tmp_path, choices)
        cut, _ = split(make_recipe(folder))
        assert evaluate(cut, data) == pytest.approx(evaluate(uncut(folder), data), rel=1e-5)
