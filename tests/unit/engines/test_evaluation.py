"""A finished run measured: each silo's answers to its held-out rows or to a file, and what they cost."""

from __future__ import annotations

import json
import random
import stat
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from isthmus.data.silo_data import SiloData
from isthmus.engines import opening
from isthmus.engines.evaluation import evaluate_run, write_predictions
from isthmus.engines.export import export_adapter
from isthmus.engines.local import create_run
from isthmus.errors import DataError
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.silo import trainer
from isthmus.silo.join import load_tokenizer
from isthmus.storage.record import RunDirectory
from tests.conftest import uncut, write_rows
from tests.integration.processes import rows_of, train_here, write_federation

LABELS = sorted({str(row["label"]) for name in ("north", "south") for row in rows_of(name)})
CHOICES = {"choices": LABELS}
pytestmark = pytest.mark.usefixtures("trunk_here")


def trained(folder: Path, **sections: object) -> RunDirectory:
    train = {"rounds": 1, "steps": 2, "evaluate": False}
    recipe = Recipe.read(write_federation(folder, train=train, **sections))
    made = create_run(recipe, folder / "run")
    train_here(made)
    return made


@pytest.fixture(scope="module")
def choosing(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run whose answers are choices."""
    return trained(tmp_path_factory.mktemp("choosing"), task=CHOICES)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_accuracy_is_that_of_the_uncut_model(choosing: RunDirectory, tmp_path: Path) -> None:
    recipe = choosing.recipe()
    export_adapter(choosing, tmp_path / "adapter")
    whole = PeftModel.from_pretrained(uncut(Path(recipe.model.path)), tmp_path / "adapter").eval()
    tokenizer = load_tokenizer(Path(recipe.model.path))
    (found,) = evaluate_run(choosing)
    assert found.silo == "north", "the other has no held-out rows"
    data = SiloData(recipe.party("north"), recipe, tokenizer)
    score = found.scores["accuracy"]
    assert score.count == len(data.held_out) == len(found.predictions)
    assert score.value == pytest.approx(trainer.evaluate(whole, data)["accuracy"])
    assert sum(found.confusion.values()) == score.count
    assert found.majority == pytest.approx(1 / 12)
    assert not found.skipped


def test_a_file_is_answered_row_by_row(choosing: RunDirectory, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "new.jsonl", rows_of("south")[:5])
    ledger = choosing.role("north").path / "ledger.jsonl"
    before = len(list(read_ledger(ledger).releases()))
    (found,) = evaluate_run(choosing, ["north"], data=[str(file)])
    assert [row.place for row in found.predictions] == [f"{file}:{line}" for line in range(1, 6)]
    assert [row.right for row in found.predictions] == [row["label"] for row in rows_of("south")[:5]]
    for row in found.predictions:
        assert sorted(row.log_probs) == LABELS
        assert row.given == max(row.log_probs, key=row.log_probs.__getitem__)
        assert torch.tensor(list(row.log_probs.values())).exp().sum() < 1.001
    assert len(list(read_ledger(ledger).releases())) > before, "what crossed is in the ledger"

    write_predictions(out := tmp_path / "made" / "answers.jsonl", [found])
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["silo"], line["given"]) for line in lines] == [("north", row.given) for row in found.predictions]


def test_written_answers_are_those_that_generation_gives(run: RunDirectory, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "new.jsonl", rows_of("south")[:3])
    (found,) = evaluate_run(run, ["north"], data=[str(file)], max_new_tokens=4)
    assert found.scores.keys() == {"token_f1", "exact_match", "rouge1", "rouge2", "rougeL"}
    assert found.majority is None
    assert not found.confusion
    with opening.open_run(run.path, "north") as silo:
        for row, source in zip(found.predictions, rows_of("south"), strict=False):
            prompt = silo.tokenizer(str(source["text"]), return_tensors="pt")
            output = silo.model.generate(**prompt, max_new_tokens=4, do_sample=False)
            given = silo.tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            assert row.given == given.strip()


@pytest.mark.parametrize(("task", "epsilon"), [(CHOICES, 20.0), ({}, 7.5)])
def test_rows_beyond_their_budgets_are_skipped_and_counted(
    task: dict[str, object], epsilon: float, tmp_path: Path
) -> None:
    """A text that comes again and again is one record; the budgets of others are their own."""
    boundary = {path: {"clip": 8.0, "noise": 40.0} for path in ("forward", "gradient", "update")}
    run = trained(tmp_path, task=task, boundary=boundary, privacy={"record_epsilon": epsilon})
    again = {"text": "w30 w31", "label": rows_of("south")[0]["label"]}
    file = write_rows(tmp_path / "new.jsonl", [*rows_of("south")[:1], *[again] * 20, *rows_of("south")[1:2]])
    (found,) = evaluate_run(run, ["north"], data=[str(file)], max_new_tokens=2)
    assert 0 < found.skipped < 20
    assert found.skipped + len(found.predictions) == 22
    answered = [row.place for row in found.predictions]
    assert answered == sorted(answered, key=lambda place: int(place.rpartition(":")[2]))
    assert answered[-1] == f"{file}:22"


def test_no_rows_are_an_error_that_names_the_option(tmp_path: Path) -> None:
    silo = {"silo": [{"name": "north", "train": "north.jsonl"}, {"name": "south", "train": "south.jsonl"}]}
    made = trained(tmp_path, task=CHOICES, **silo)
    with pytest.raises(DataError, match="north has no held-out rows") as caught:
        list(evaluate_run(made, ["north"]))
    assert "--data" in str(caught.value.remedy)


@pytest.mark.parametrize("choose", [True, False])
def test_rows_of_any_length_are_answered_as_each_by_itself_in_order(
    choose: bool, choosing: RunDirectory, run: RunDirectory, tmp_path: Path
) -> None:
    """They are grouped by length over the whole file."""
    draw, used = random.Random(4), choosing if choose else run
    rows = [{"text": " ".join(["w5"] * draw.randrange(1, 60)), "label": LABELS[n % len(LABELS)]} for n in range(40)]
    (whole,) = evaluate_run(used, ["north"], data=[str(write_rows(tmp_path / "all.jsonl", rows))], max_new_tokens=2)
    assert [row.place for row in whole.predictions] == [f"{tmp_path / 'all.jsonl'}:{n}" for n in range(1, 41)]
    for number in (0, 17, 39):
        file = write_rows(tmp_path / f"{number}.jsonl", rows[number : number + 1])
        (alone,) = evaluate_run(used, ["north"], data=[str(file)], max_new_tokens=2)
        assert alone.predictions[0].given == whole.predictions[number].given
        for name, value in alone.predictions[0].log_probs.items():
            assert whole.predictions[number].log_probs[name] == pytest.approx(value, abs=1e-3)
