"""A finished run in use: answers and drafts. The trunk serves in this process."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from isthmus.engines import inference
from isthmus.engines.local import create_run
from isthmus.errors import DataError, ModelError, RecipeError
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe, TaskSection
from isthmus.silo.join import load_data
from isthmus.storage.record import RunDirectory
from tests.conftest import write_rows
from tests.integration.processes import rows_of, train_here, write_federation

PROMPT = str(rows_of("north")[0]["text"])
pytestmark = pytest.mark.usefixtures("trunk_here")


def test_answers_are_streamed_returned_and_charged(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = run.role("north").path / "ledger.jsonl"
    before = len(list(read_ledger(ledger).releases()))
    answer = inference.generate_text(run, PROMPT, None, max_new_tokens=3, chat=False)
    assert capsys.readouterr().out.strip() == answer.strip()
    assert len(list(read_ledger(ledger).releases())) > before


def test_the_prompt_that_is_sent_is_that_of_the_training_row(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its fields and, as the template has one field, from its text; raw text is another prompt."""
    sent: list[list[int]] = []
    with inference.connected_silo(run, "north") as (silo, _):
        data = load_data(run.recipe(), "north", silo)
        row = rows_of("north")[0]
        (number,) = [n for n, (_, example) in enumerate(data.sets[0].texts) if str(row["text"]) in example.prompt][:1]
        generate = silo.model.generate

        def noted(**inputs: Any) -> Any:
            sent.append(inputs["input_ids"][0].tolist())
            return generate(**inputs)

        monkeypatch.setattr(silo.model, "generate", noted)
        (name,) = run.recipe().task.asked
        for asked in (
            inference.PromptRequest(str(row["text"])),
            inference.PromptRequest(fields={name: str(row["text"])}),
            inference.PromptRequest("w5 w6", raw=True),
        ):
            inference.stream_answer(silo, asked.example(run.recipe().task), max_new_tokens=2)
        for own in (str(row["text"]), {name: str(row["text"])}):
            made = silo.prompt(own)
            assert made["input_ids"].tolist() == [data.train[number].prompt]
            assert made["attention_mask"].tolist() == [[1] * len(data.train[number].prompt)]
        with pytest.raises(DataError, match="does not fill"):
            silo.prompt({"another": "w5"})
        assert inference.stop_tokens(silo.model, [7]) == [2, 7]
        assert inference.stop_tokens(silo.model, []) == [2]
    assert sent == [data.train[number].prompt] * 2 + [[5, 6]]


def test_what_is_asked_must_be_one_thing() -> None:
    task = TaskSection(prompt="{text}")
    for wrong in (
        inference.PromptRequest(),
        inference.PromptRequest("a", {"text": "b"}),
        inference.PromptRequest(fields={"text": "b"}, raw=True),
        inference.PromptRequest(fields={"text": "b"}, chat=True),
        inference.PromptRequest(" "),
        inference.PromptRequest(" ", raw=True),
    ):
        with pytest.raises(DataError) as caught:
            wrong.example(task)
        assert caught.value.remedy
    assert inference.PromptRequest("a").example(task) == inference.PromptRequest(fields={"text": "a"}).example(task)
    chat = inference.PromptRequest("a", chat=True)
    assert chat.example(task).turns == chat.example(TaskSection(prompt="{text}", chat=True)).turns


def test_fields_are_named_once() -> None:
    assert inference.named_fields(["a=b=c", "d="]) == {"a": "b=c", "d": ""}
    for wrong in (["a"], ["=a"], ["a=b", "a=c"]):
        with pytest.raises(DataError, match="NAME=VALUE"):
            inference.named_fields(wrong)


def test_a_draft_is_made_once_and_used_by_who_answers(run: RunDirectory) -> None:
    told: list[str] = []
    with inference.connected_silo(run, "south") as (silo, directory):
        assert inference.load_draft(directory, silo) is None
    path = inference.make_draft(run, "south", prompts=2, max_new_tokens=3, notify=told.append)
    assert told
    assert path.parent == run.role("south").path
    with inference.connected_silo(run, "south") as (silo, directory):
        assert inference.load_draft(directory, silo) is not None


def test_a_chat_takes_a_template_and_a_silo_of_the_recipe(run: RunDirectory) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        inference.generate_text(run, PROMPT, None, max_new_tokens=3, chat=True)
    with pytest.raises(RecipeError, match="no silo 'west'"):
        inference.generate_text(run, PROMPT, "west", max_new_tokens=3, chat=False)


def test_a_known_task_says_how_long_answers_are_and_where_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the caller does."""
    row = {"story": "w5 w6 w7", "questions": ["w8"], "answers": ["w9"]}
    for name in ("north", "south"):
        write_rows(tmp_path / f"{name}-coqa.jsonl", [row] * 3)
    silos = [{"name": name, "train": f"{name}-coqa.jsonl"} for name in ("north", "south")]
    train = {"rounds": 1, "steps": 1, "evaluate": False}
    values = tomllib.loads(write_federation(tmp_path, train=train, silo=silos).read_text())
    values["task"] = {"name": "coqa"}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(values))
    run = create_run(Recipe.read(tmp_path / "recipe.toml"), tmp_path / "run")
    train_here(run)
    asked: list[dict[str, Any]] = []
    stream = inference.stream_answer

    def noted(silo: Any, example: Any, **how: Any) -> str:
        asked.append(how)
        return stream(silo, example, **how)

    monkeypatch.setattr(inference, "stream_answer", noted)
    request = inference.PromptRequest(fields=row)
    inference.generate_text(run, request, "north")
    inference.generate_text(run, request, "north", max_new_tokens=3)
    raw = inference.PromptRequest("w5", raw=True)
    text = inference.generate_text(run, raw, "north")
    assert [(how["max_new_tokens"], how["stop"]) for how in asked] == [(32, ("\n",)), (3, ("\n",)), (64, ())]
    words = text.split()
    word = next(one for one in words if one != words[0])
    with inference.connected_silo(run, "north") as (silo, _):
        stopped = stream(silo, raw.example(run.recipe().task), max_new_tokens=32, stop=[f" {word}"])
    assert stopped == " ".join(words[: words.index(word)])
