"""A file of rows answered: each as generation answers it, in order, once, whatever stops it on the way."""

from __future__ import annotations

import fcntl
import gzip
import json
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from isthmus.engines import batch, inference, opening
from isthmus.engines.batch import answer_file
from isthmus.engines.evaluation import evaluate_run
from isthmus.engines.local import create_run
from isthmus.errors import BudgetExhausted, DataError, DiskFullError, RunError
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from tests.conftest import make_recipe, save_tiny_model, write_rows
from tests.integration.processes import rows_of, train_here, write_federation

pytestmark = pytest.mark.usefixtures("trunk_here")
ROWS = [{"text": row["text"], "id": f"é-{number}", "answer": None} for number, row in enumerate(rows_of("south"))]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def releases(run: RunDirectory, silo: str = "north") -> int:
    return len(list(read_ledger(run.role(silo).path / "ledger.jsonl").releases()))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", ROWS)


def test_each_row_is_answered_as_generation_answers_it(run: RunDirectory, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "out.jsonl"
    assert answer_file(run, rows, out, "north", max_new_tokens=5) == len(ROWS)
    lines = read(out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert [line["row"] for line in lines] == list(range(1, len(ROWS) + 1))
    assert [line["input"] for line in lines] == ROWS
    assert {(line["silo"], line["round"], line["question"]) for line in lines} == {("north", 1, 1)}
    with opening.open_run(run.path, "north") as silo:
        for line in lines:
            example = inference.PromptRequest(line["input"]["text"]).example(run.recipe().task)
            given = inference.stream_answer(silo, example, max_new_tokens=5)
            assert line["answer"] == given.strip()
            assert line["finish"] in ("stop", "length")


def test_choices_are_chosen_as_evaluation_chooses_them(tmp_path: Path) -> None:
    labels = sorted({str(row["label"]) for name in ("north", "south") for row in rows_of(name)})
    train = {"rounds": 1, "steps": 2, "evaluate": False}
    recipe = Recipe.read(write_federation(tmp_path, train=train, task={"choices": labels}))
    run = create_run(recipe, tmp_path / "run")
    train_here(run)
    labelled = write_rows(tmp_path / "labelled.jsonl", rows_of("south"))
    answer_file(run, write_rows(tmp_path / "in.jsonl", ROWS), out := tmp_path / "out.jsonl", "north")
    (evaluated,) = evaluate_run(run, ["north"], data=[str(labelled)])
    for line, one in zip(read(out), evaluated.predictions, strict=True):
        assert (line["answer"], line["finish"]) == (one.given, "choice")
        assert line["log_probs"] == pytest.approx(one.log_probs, rel=1e-5)


@pytest.mark.parametrize("left", [0, 1, 0.3, 0.5, 0.999])
def test_it_goes_on_from_any_byte_at_which_it_was_cut(
    left: float, run: RunDirectory, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "IN_MEMORY", 5)
    answer_file(run, rows, out := tmp_path / "out.jsonl", "north", max_new_tokens=3)
    whole, first = out.read_bytes(), releases(run)
    out.write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    kept = out.read_bytes().count(b"\n")
    told: list[str] = []
    answer_file(run, rows, out, "north", max_new_tokens=3, notify=told.append)
    assert out.read_bytes() == whole
    assert any("going on after" in line for line in told) == bool(kept)
    before = releases(run)
    assert before > first
    answer_file(run, rows, out, "north", max_new_tokens=3)
    assert releases(run) == before, "what is answered is not sent again"
    assert out.read_bytes() == whole


BAD = {
    "no JSON": (b'{"text": ', "is not JSON"),
    "no object": (b'["w5"]', "is not a JSON object"),
    "no field": (b'{"other": "w5"}', "'text'"),
    "null": (b'{"text": null}', "no text in 'text'"),
    "blank": (b'{"text": "  "}', "no text in 'text'"),
    "a list": (b'{"text": ["w5"]}', "not a text"),
    "half a pair": (b'{"text": "\\ud83d"}', "surrogate"),
    "no UTF-8": (b'{"text": "\xff"}', "UTF-8"),
    "twice": (b'{"text": "w5", "text": "w6"}', "two values are named"),
    "too long": (b'{"text": "' + b"w5 " * 600 + b'"}', "leave no room"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_before_anything_is_sent(kind: str, run: RunDirectory, rows: Path, tmp_path: Path) -> None:
    line, why = BAD[kind]
    good = rows.read_bytes()
    rows.write_bytes(good + b"\r\n" + line + b"\n" + good + line + b"\n")
    before, out = releases(run), tmp_path / "out.jsonl"
    with pytest.raises(DataError) as caught:
        answer_file(run, rows, out, "north")
    assert caught.value.message.startswith("2 rows or files are unusable")
    assert f"{rows}:14" in caught.value.message
    assert f"{rows}:27" in caught.value.message
    assert why in caught.value.message
    assert not out.exists()
    assert releases(run) == before


def test_gzip_marks_and_line_ends_are_read(run: RunDirectory, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    with gzip.open(source, "wb") as file:
        file.write(b"\xef\xbb\xbf" + b'{"text": "w5 w6"}\r\n\r\n{"text": "w7"}')
    assert answer_file(run, source, out := tmp_path / "out.jsonl", "north", max_new_tokens=2) == 2
    assert [line["row"] for line in read(out)] == [1, 3]
    source.write_bytes(source.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot read the data file"):
        answer_file(run, source, tmp_path / "other.jsonl", "north")
    (tmp_path / "empty.jsonl").touch()
    for path, why in ((tmp_path / "empty.jsonl", "holds no row"), (tmp_path / "absent.jsonl", "No such file")):
        with pytest.raises(DataError, match=why):
            answer_file(run, path, tmp_path / "other.jsonl", "north")


def test_answers_to_other_rows_are_never_mixed(run: RunDirectory, rows: Path, tmp_path: Path) -> None:
    def call(name: str = "north") -> None:
        answer_file(run, rows, out, name, max_new_tokens=2)

    out = tmp_path / "out.jsonl"
    call()
    whole = out.read_bytes()
    with pytest.raises(DataError, match=r"line 1 of .* by south after round 1: its silo differs"):
        call("south")
    lines = read(out)
    out.write_text("".join(f"{json.dumps(line | {'round': 3})}\n" for line in lines))
    with pytest.raises(DataError, match="its round differs"):
        call()
    out.write_bytes(whole + whole)
    with pytest.raises(DataError, match=r"line 13 of .* is no answer to any row"):
        call()
    out.write_text("some notes of mine\n")
    with pytest.raises(DataError, match="holds no answers"):
        call()
    assert out.read_text() == "some notes of mine\n"
    with pytest.raises(DataError, match="the rows themselves"):
        answer_file(run, rows, rows, "north")
    out.write_bytes(whole)
    changed = [{**row, "text": "w9"} if number == 6 else row for number, row in enumerate(ROWS)]
    write_rows(rows, changed)
    with pytest.raises(DataError, match=r"is no answer to .*in.jsonl:7 by north after round 1: its input differs"):
        call()
    assert out.read_bytes() == whole
    write_rows(rows, ROWS)
    with out.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process writes"):
            call()
    call()
    assert out.read_bytes() == whole


@contextmanager
def files_of(size: int) -> Iterator[None]:
    """No file may grow beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """Half of what is to be written fits."""
    out = tmp_path / "out.jsonl"
    line = {"row": 1, "answer": "w5" * 40}
    with batch._Answers(out, tmp_path / "in.jsonl") as answers:
        answers.append([line] * 3)
        before = out.read_bytes()
        with files_of(len(before) * 3 // 2), pytest.raises(DiskFullError):
            answers.append([line] * 3)
        assert out.read_bytes() == before
        assert answers.count == 3
        answers.append([line])
    assert out.read_bytes() == before + before[: len(before) // 3]


SPENT = {
    "boundary": {path: {"clip": 8.0, "noise": 40.0} for path in ("forward", "gradient", "update")},
    "train": {"rounds": 1, "steps": 1, "batch": 1, "evaluate": False},
}


@pytest.mark.parametrize("limit", ["record_epsilon", "silo_epsilon"])
def test_a_spent_budget_keeps_what_is_answered(limit: str, tmp_path: Path) -> None:
    """Of a record: a text that comes again and again. Of the silo: all texts together."""
    epsilon = {"record_epsilon": 8.0, "silo_epsilon": 12.0}[limit]
    recipe = Recipe.read(write_federation(tmp_path, privacy={limit: epsilon}, **SPENT))
    run = create_run(recipe, tmp_path / "run")
    train_here(run)
    some = [{"text": f"w{number + 10} w5"} for number in range(20)]
    if limit == "record_epsilon":
        some[3:] = [some[2]] * 17
    rows, out = write_rows(tmp_path / "in.jsonl", some), tmp_path / "out.jsonl"
    with pytest.raises(BudgetExhausted) as caught:
        answer_file(run, rows, out, "north", max_new_tokens=2)
    lines = read(out)
    assert 2 <= len(lines) < 20
    assert [line["input"] for line in lines] == some[: len(lines)]
    assert caught.value.message.startswith(f"{rows}:{len(lines) + 1} is not answered: the ")
    assert f"the answers before it are in {out}" in caught.value.message
    assert limit in caught.value.remedy
    kept, before = out.read_bytes(), releases(run)
    with pytest.raises(BudgetExhausted):
        answer_file(run, rows, out, "north", max_new_tokens=2)
    assert out.read_bytes() == kept
    assert releases(run) - before <= 2, "what is answered is neither sent nor charged again"
    if limit == "record_epsilon":  # other rows' budgets are their own
        write_rows(rows, [*some[: len(lines)], {"text": "w30"}])
        assert answer_file(run, rows, out, "north", max_new_tokens=2) == len(lines) + 1


def test_a_known_task_needs_no_labels(tmp_path: Path) -> None:
    recipe = make_recipe(save_tiny_model("llama", tmp_path / "model"), task={"name": "boolq"})
    row = {"passage": "w5 w6", "question": "w7"}
    path = write_rows(tmp_path / "in.jsonl", [row, {**row, "label": -1}, {**row, "label": 1}, {"passage": "w5"}])
    source = batch._Source(path, recipe, recipe.silo[0], batch.load_tokenizer(tmp_path / "model"))
    bad = batch.BadRows()
    asked = list(source.questions(bad))
    assert len(asked) == 3
    assert all(one.question == asked[0].question for one in asked)
    assert asked[0].question.names == ("no", "yes")
    with pytest.raises(DataError, match=r"in.jsonl:4.*'question'"):
        bad.raise_any()
