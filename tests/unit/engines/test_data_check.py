"""The check of all silos' rows in tokens, and what ``isthmus data`` says of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.engines.data_check import check_lengths, summarize_data
from isthmus.engines.local import create_run
from isthmus.engines.roles import recorded
from isthmus.errors import DataError, ModelError, RecipeError
from isthmus.recipe import Recipe
from tests.conftest import make_recipe, save_tiny_tokenizer, tiny_config, write_rows

ROWS = [{"prompt": "w5 w6", "answer": "w7"}, {"prompt": "w5 w6 w7 w8", "answer": "w9"}]


def recipe(folder: Path, *, vocabulary: int = 97, **train: object) -> Recipe:
    """Silo a has the first row, b both; c both, and evaluates on the first."""
    save_tiny_tokenizer(folder)
    config = tiny_config("llama")
    config.vocab_size = vocabulary
    config.save_pretrained(folder)
    silos = [
        {"name": name, "train": str(write_rows(folder / f"{name}.jsonl", ROWS[:length]))}
        for name, length in (("a", 1), ("b", 2), ("c", 2))
    ]
    silos[2]["held_out"] = silos[0]["train"]
    return make_recipe(folder, silo=silos, train=train)


def test_all_silos_long_rows_are_counted_before_anything_starts(tmp_path: Path) -> None:
    refusing = recipe(tmp_path, max_tokens=5, long_rows="refuse")
    with pytest.raises(DataError, match=r"^2 rows .*b\.jsonl:2 has 6 tokens.*; .*c\.jsonl:2 has 6"):
        create_run(refusing, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_lengths(recipe(tmp_path, max_tokens=6, long_rows="refuse"))
    assert create_run(recipe(tmp_path, max_tokens=5), tmp_path / "run").recipe().train.long_rows == "truncate"


def test_a_summary_is_of_what_the_silos_will_train_on(tmp_path: Path) -> None:
    summary = summarize_data(recipe(tmp_path, max_tokens=5), examples=1)
    a, b, c = summary.silos
    assert [one.sets["train"].rows for one in (a, b, c)] == [1, 2, 2]
    assert (b.sets["train"].truncated, b.sets["train"].lengths and b.sets["train"].lengths.most) == (1, 6)
    (example,) = b.examples
    assert (example.place, example.prompt, example.answer) == (f"{tmp_path}/b.jsonl:1", "w5 w6", "w7 </s>")
    first, second = summary.duplicates
    assert first.across == "train and held out"
    assert first.places[-1] == f"c, held out: {tmp_path}/a.jsonl:1"
    assert second.places == [f"b, train: {tmp_path}/b.jsonl:2", f"c, train: {tmp_path}/c.jsonl:2"]


def test_one_silo_is_read_without_the_others_files(tmp_path: Path) -> None:
    read = recipe(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    assert [one.error for one in summarize_data(read, ["b"]).silos] == [None]
    assert "cannot read the data file" in str(summarize_data(read).silos[0].error)
    with pytest.raises(RecipeError, match="no silo 'd'"):
        summarize_data(read, ["d"])


def test_tokens_that_the_model_lacks_are_found(tmp_path: Path) -> None:
    summary = summarize_data(recipe(tmp_path, vocabulary=9))
    assert [one.error is None for one in summary.silos] == [True, False, False]
    assert "b.jsonl:2 has the token 9, but the model has 9 tokens" in str(summary.silos[1].error)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError):
        summarize_data(make_recipe(tmp_path))


def test_the_command_fails_on_bad_rows_after_it_has_shown_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe(tmp_path).toml())
    told = CliRunner().invoke(app, ["data", str(path), "--json", "--examples", "0"])
    assert told.exit_code == 0
    assert [one["examples"] for one in json.loads(told.stdout)["silos"]] == [[], [], []]
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"prompt": null, "answer": "w5"}\n{"prompt": "w4", "answer": []}\n')
    told = CliRunner().invoke(app, ["data", str(path)])
    assert told.exit_code == 1
    assert "error: b: 2 rows or files are unusable" in told.stdout
    assert "b.jsonl:3 has no text in 'prompt'" in told.stdout
    assert told.stdout.count("prompt, then answer") == 5


def test_a_divided_set_is_shown_by_silo_and_its_roles_are_refused_one_by_one(tmp_path: Path) -> None:
    whole = recipe(tmp_path)
    rows = [{"prompt": f"w{4 + number}", "answer": f"w{5 + number % 2}"} for number in range(40)]
    partition = {"data": str(write_rows(tmp_path / "all.jsonl", rows)), "by": "dirichlet", "field": "answer"}
    divided = make_recipe(tmp_path, silos=(), silo=[{"name": "a"}, {"name": "b"}], partition=partition)
    found = summarize_data(divided)
    assert sum((Counter(one.divided_by) for one in found.silos), Counter()) == {"w5": 20, "w6": 20}
    assert [one.sets["train"].answers for one in found.silos] == [
        {f"{answer}": count for answer, count in one.divided_by.items()} for one in found.silos
    ]
    assert not found.duplicates
    run = create_run(divided, tmp_path / "run")
    assert run.recipe().partition == divided.partition
    path = tmp_path / "recipe.toml"
    path.write_text(divided.toml())
    with pytest.raises(RecipeError, match="simulations on one machine") as caught:
        recorded(path, Recipe.read(path), tmp_path / "other")
    assert "isthmus run" in caught.value.remedy
    assert recorded(run.recipe_path, run.recipe(), run.path).path == run.path
    path.write_text(whole.toml())
    recorded(path, Recipe.read(path), tmp_path / "other")


def test_a_silos_own_rows_are_checked_before_it_writes_anything(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe(tmp_path).toml())
    read = Recipe.read(path)
    (tmp_path / "a.jsonl").write_text("no\n")
    write_rows(tmp_path / "b.jsonl", [*ROWS, {"prompt": "w5"}, {"answer": "w5"}])
    with pytest.raises(DataError, match=r"^2 rows .*b\.jsonl:3 .*b\.jsonl:4 ") as caught:
        recorded(path, read, tmp_path / "silo", "b")
    assert "a.jsonl" not in caught.value.message
    assert not (tmp_path / "silo").exists()
    write_rows(tmp_path / "b.jsonl", ROWS)
    assert recorded(path, read, tmp_path / "silo", "b").recipe() == read
    (tmp_path / "b.jsonl").unlink()
    recorded(path, read, tmp_path / "trunk")
