"""A silo that trains on conversations: turns are rows, a conversation is one record, its loss is the uncut model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.data.silo_data import SiloData
from isthmus.errors import DataError, ModelError
from isthmus.federation.aggregator import root_service
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting, load_tokenizer
from isthmus.silo.trainer import evaluate
from isthmus.silo.worker import Worker
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model, uncut, write_rows

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ 'w80 ' + message['role'] + ' ' + message['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w80 assistant ' }}{% endif %}"
)


def turns(*said: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(said)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]}


ROWS = [
    turns("w5 w6", "w7", "w8 w9 w10", "w11 w12", "w13", "w14"),
    turns("w15 </s> w16", "w17 w18"),
    turns("w19", "w20", "w21 w22", "w23"),
]
TURNS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    return place


def recipe_of(folder: Path, place: Path, rows: list[dict[str, Any]], **sections: Any) -> Recipe:
    path = str(write_rows(place / "rows.jsonl", rows))
    return make_recipe(
        folder,
        silo=[{"name": "a", "train": path, "held_out": path}],
        task={"messages": ["messages"], "system": "w60 w61"},
        train={"rounds": 1, "steps": 2, "batch": TURNS, "evaluate": True},
        boundary={path: {"clip": 1.0, "noise": 1.0} for path in ("forward", "gradient")},
        **sections,
    )


def run(recipe: Recipe, place: Path) -> RunDirectory:
    directory = RunDirectory.create(place / "run", recipe)
    trunk, root = TrunkService(recipe, directory.role("trunk")), root_service(recipe, directory.role("root"))
    greets = greeting(Checkpoint(recipe.model.path), recipe)
    channels = {"trunk": LoopbackChannel(trunk, "a", greeting=greets), "root": LoopbackChannel(root, "a")}
    worker = Worker(recipe, "a", directory.role("a"), **channels)
    try:
        worker.run()
    finally:
        worker.close()
        trunk.stop()
    return directory


def test_each_turn_is_a_row_and_a_conversation_is_one_record(folder: Path, tmp_path: Path) -> None:
    directory = run(recipe_of(folder, tmp_path, ROWS), tmp_path)
    lines = list(read_journal(directory.role("a").path / "metrics.jsonl"))
    assert [line["event"] for line in lines].count("step") == 2
    crossed = [
        one for one in read_ledger(directory.role("a").path / "ledger.jsonl").releases() if one.path == "forward"
    ]
    assert {len(one.charges) for one in crossed} == {len(ROWS)}
    assert len({charge.record for one in crossed for charge in one.charges}) == len(ROWS)


def test_the_loss_is_that_of_the_uncut_model_on_the_answers(folder: Path, tmp_path: Path, split: Any) -> None:
    recipe = recipe_of(folder, tmp_path, ROWS)
    tokenizer = load_tokenizer(folder)
    data = SiloData(recipe.silo[0], recipe, tokenizer)
    assert [tokenizer.decode(row.answer) for row in data.train[:3]] == ["w7 </s>", "w11 w12 </s>", "w14 </s>"]
    cut, _ = split(make_recipe(folder))
    assert evaluate(cut, data) == pytest.approx(evaluate(uncut(folder), data), rel=1e-5)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"messages": [{"role": "tool", "content": "w5"}, {"role": "assistant", "content": "w6"}]}, "no tools"),
        (turns("w5", ""), "no text in 'content'"),
        ({"messages": None}, "no list of messages"),
    ],
)
def test_a_row_that_the_template_refuses_is_named_with_its_line(
    row: dict[str, Any], error: str, folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folder, tmp_path, [*ROWS, row, *ROWS])
    with pytest.raises(DataError, match=rf"rows\.jsonl:4.*{error}") as caught:
        SiloData(recipe.silo[0], recipe, load_tokenizer(folder))
    assert caught.value.remedy


def test_a_model_without_a_template_is_named(folder: Path, tmp_path: Path) -> None:
    bare = save_tiny_model("llama", tmp_path / "bare")
    recipe = recipe_of(bare, tmp_path, ROWS)
    with pytest.raises(ModelError, match="no chat template"):
        SiloData(recipe.silo[0], recipe, load_tokenizer(bare))
