"""Training rows that are held out too: found whatever their case and white space, named, kept, dropped or refused."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest

from isthmus.data.bad_rows import BadRows
from isthmus.data.duplicates import prompt_key, repeated_prompts
from isthmus.data.examples import check_examples, silo_examples
from isthmus.data.templates import Example
from isthmus.engines.local import create_run
from isthmus.errors import DataError
from isthmus.recipe import Recipe
from tests.conftest import make_recipe, save_tiny_model, write_rows

TRAIN = ["w5 w6", "W7  w8", "w9", "w5\tw6 ", "w10"]
HELD_OUT = ["w20", "w7 w8", " w5 w6", "w7 w8"]


def recipe(folder: Path, policy: str | None = None, **sections: Any) -> Recipe:
    files = {}
    for key, texts in (("train", TRAIN), ("held_out", HELD_OUT)):
        rows = [{"text": text, "label": f"w{number}"} for number, text in enumerate(texts, 4)]
        files[key] = str(write_rows(folder / f"{key}.jsonl", rows))
    train = {"evaluate": "end", "rounds": 1} | ({"duplicates": policy} if policy else {})
    task = {"prompt": "{text}", "answer": "{label}"}
    model = folder / "model" if (folder / "model").exists() else Path("none")
    return make_recipe(model, silo=[{"name": "a", **files}], task=task, train=train, **sections)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_by_default_both_files_and_lines_are_named_before_anything_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model("llama", tmp_path / "model")
    create_run(recipe(tmp_path), tmp_path / "run")
    (line,) = warnings(caplog)
    train, held = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    assert line == (
        f"a: 3 of 5 training rows have prompts that are held out: {train}:1 and {held}:3; {train}:2 and {held}:2; "
        f"{train}:4 and {held}:3"
    )


def test_dropped_rows_are_not_trained_on_and_held_out_ones_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = recipe(tmp_path, "drop")
    train, held_out = silo_examples(asked.silo[0], asked, BadRows())
    assert [place.rpartition(":")[2] for place, _ in train] == ["3", "5"]
    assert len(held_out) == len(HELD_OUT)
    check_examples(asked)
    assert warnings(caplog) == []


def test_refused_rows_are_named_and_counted_and_no_run_is_created(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 rows or files are unusable") as caught:
        create_run(recipe(tmp_path, "refuse"), tmp_path / "run")
    train, held = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    assert f"{train}:2 has the prompt of {held}:2, which is held out" in caught.value.message
    assert 'train.duplicates = "drop"' in caught.value.remedy
    assert not (tmp_path / "run").exists()
    save_tiny_model("llama", tmp_path / "model")
    create_run(recipe(tmp_path, "drop"), tmp_path / "run")


def test_parts_of_one_set_are_looked_through_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(tmp_path / "all.jsonl", [{"text": f"w{4 + n % 3}", "label": f"w{n % 2}"} for n in range(40)])
    partition = {"data": str(tmp_path / "all.jsonl"), "by": "iid", "held_out": 0.3}
    task, silos = {"prompt": "{text}", "answer": "{label}"}, [{"name": "a"}, {"name": "b"}]
    check_examples(make_recipe(Path("none"), partition=partition, silo=silos, task=task))
    assert len([line for line in warnings(caplog) if "training rows have prompts that are held out" in line]) == 2


def test_a_silo_of_one_class_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    silos = []
    for name, labels in (("a", [" yes"] * 5), ("b", [" no", " yes"])):
        rows = [{"text": f"w{number}", "label": label} for number, label in enumerate(labels)]
        silos.append({"name": name, "train": str(write_rows(tmp_path / f"{name}.jsonl", rows))})
    task = {"prompt": "{text}:", "answer": "{label}", "choices": [" yes", " no"]}
    check_examples(make_recipe(Path("none"), silo=silos, task=task))
    assert warnings(caplog) == ["a: all 5 training rows have one answer"]


def test_plain_texts_are_compared_as_texts() -> None:
    """They have no prompt, and are no duplicates for that."""
    train = [("t:1", Example("", "Some text", whole=True)), ("t:2", Example("", "Another", whole=True))]
    assert repeated_prompts(train, [("h:1", Example("", "some  TEXT", whole=True))]) == {0: "h:1"}


def test_duplicates_are_those_of_a_plain_comparison() -> None:
    draw = random.Random(2)
    for _ in range(50):
        sets = [
            [(f"{name}:{n}", Example("".join(draw.choices("aAßb \t\n", k=3)) + ".", "")) for n in range(12)]
            for name in "th"
        ]
        expected = {}
        for number, (_, one) in enumerate(sets[0]):
            same = [
                place for place, other in sets[1] if one.prompt.casefold().split() == other.prompt.casefold().split()
            ]
            if same:
                expected[number] = same[0]
        assert repeated_prompts(*sets) == expected
    assert prompt_key(Example("STRASSE", "")) == prompt_key(Example("straße", ""))
