"""Which choice is right does not show in what crosses but the tensors' values: no length, count, weight, size or order.

Choices of unequal token counts, such as " contradiction" (1 token of SmolLM2) and " entailment" (2), showed by their
lengths alone which one a row has, to the trunk and, in a silo's weight, to the root.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Batch, Tokens, collate
from isthmus.federation.aggregator import root_service
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.join import greeting, load_tokenizer
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import train_step
from isthmus.silo.worker import Worker
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model, write_rows
from tests.oracle import test_federation as pooled
from tests.oracle.twins import Tensors, Twins, assert_same, lora_of, make_twins, save_vivid_model

CHOICES = ("w60", "w61 w62", "w63 w64 w65", "w66")
LONGEST = 3
PROMPTS = (4, 2, 9, 2, 30, 11)
"""Tokens of each row's prompt; one is cut, by what a row may have at most."""
MOST = 16
Labels = Sequence[int]
NOISED = {"clip": 5.0, "noise": 0.1}
LONE = ("w70", "w71", "w72", "w73")
"""Choices of one token."""
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batches": {"train": {"micro_batches": 2}},
    "tail and bottleneck": {"boundary": {"tail": 2, "width": 8, "residual": True, "denoise": True}},
    "tail alone": {"boundary": {"tail": 1}},
    "without gradients": {"boundary": {"gradients": False, "residual": True}},
    "released once": {"boundary": {"release_once": True}, "lora": {"freeze_bottom": True}},
    "noised, int8": {
        "boundary": {
            **dict.fromkeys(("forward", "gradient", "update"), NOISED),
            "codec": {"forward_up": "int8", "gradient_up": "int8"},
        }
    },
    "whole sequences clipped": {
        "boundary": {
            "gradient": {"mechanism": "dp_gaussian", "clip": 0.1, "epsilon": 5.0, "delta": 1e-5, "unit": "sequence"}
        }
    },
    "defended": {"boundary": {"width": 8, "defence": {"answer": 1.0, "inverter": 0.5}}},
    "sharpness": {"train": {"sharpness": 0.05}},
    "epochs": {"train": {"epochs": 2, "batch": 4}},
    "compressed update": {"federation": {"compression": {"kind": "random-k", "bits": 8}}},
    "equal weights": {"federation": {"weights": {"kind": "equal"}}},
    "a budget of a record": {
        "boundary": {path: {"clip": 1.0, "noise": 10.0} for path in ("forward", "gradient")},
        "privacy": {"record_epsilon": 4.0},  # some rows' are spent within the round
    },
    "one token": {"task": {"choices": LONE}},
    "a chat": {"task": {"chat": True, "system": "w90 w91"}},
    "choices that begin alike": {"task": {"choices": ("w60", "w60 w61", "w63 w64 w65", "w66")}},
    "spaces at the prompt's end": {"task": {"prompt": "{text}  ", "truncate": "middle"}},
}
CHAT = (
    "{% for message in messages %}{{ 'w80 ' + message['role'] + ' ' + message['content'] + ' w81 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w80 w82 ' }}{% endif %}"
)


class Recorder(LoopbackChannel):
    """A channel that notes the looks of every frame that the silo sends."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.looks: list[Any] = []
        super().__init__(*arguments, **options)

    def submit(self, request: Message) -> Answer:
        self.looks.append(look_of(request))
        return super().submit(request)


def look_of(message: Message) -> Any:
    """A frame without its payloads: of bytes their number, all else as it is."""
    return type(message).__name__, [
        (field.name, _look(value)) for field, value in message.ListFields() if field.name not in ("run", "instance")
    ]


def _look(value: Any) -> Any:
    if isinstance(value, Message):
        return look_of(value)
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, str | int | float):
        return value
    return [_look(one) for one in value]


def renamed(looks: list[Any]) -> list[Any]:
    """The looks with examples' numbers, which are keyed hashes, by the order in which they appear."""
    numbers: dict[int, int] = {}

    def of(look: Any) -> Any:
        kind, fields = look
        return kind, [
            (name, [numbers.setdefault(one, len(numbers)) for one in (value if isinstance(value, list) else [value])])
            if name in ("example", "examples")
            else (name, value)
            for name, value in fields
        ]

    return [of(look) for look in looks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)
    (place / "chat_template.jinja").write_text(CHAT)
    return place


def rows_of(labels: Labels, choices: Sequence[str], first: int) -> list[dict[str, str]]:
    return [
        {"text": " ".join(f"w{4 + (first + 7 * row + 3 * n) % 50}" for n in range(length)), "label": choices[label]}
        for row, (length, label) in enumerate(zip(PROMPTS, labels, strict=True))
    ]


def recipe_of(folder: Path, place: Path, labels: Labels, **sections: Any) -> Recipe:
    choices = sections.get("task", {}).get("choices", CHOICES)
    half = len(labels) // 2
    parts = {"train": rows_of(labels[:half], choices, 0), "held_out": rows_of(labels[half:], choices, 25)}
    files = {part: str(write_rows(place / f"{part}.jsonl", rows)) for part, rows in parts.items()}
    merged: dict[str, Any] = {
        "silo": [{"name": "a", **files}],
        "task": {"prompt": "{text}", "answer": "{label}", "choices": choices},
        "train": {"rounds": 1, "batch": 3, "max_tokens": MOST, "learning_rate": 0.01, "evaluate": True},
    }
    if "epochs" not in sections.get("train", {}):
        merged["train"]["steps"] = 2
    for table, values in sections.items():
        merged[table] = {**merged.get(table, {}), **values}
    return make_recipe(folder, **merged)


def sent_in_a_run(folder: Path, place: Path, labels: Labels, **sections: Any) -> list[Any]:
    """The looks of all frames to trunk and root, of a run of one round with evaluations before and after."""
    place.mkdir(parents=True)
    recipe = recipe_of(folder, place, labels, **sections)
    directory = RunDirectory.create(place / "run", recipe)
    trunk, root = TrunkService(recipe, directory.role("trunk")), root_service(recipe, directory.role("root"))
    greets = greeting(Checkpoint(recipe.model.path), recipe)
    channels = {"trunk": Recorder(trunk, "a", greeting=greets), "root": Recorder(root, "a")}
    worker = Worker(recipe, "a", directory.role("a"), **channels)
    try:
        worker.run()
    finally:
        worker.close()
        trunk.stop()
    return [renamed(channel.looks) for channel in channels.values()]


EVERY_LABEL_ALIKE = [[number] * 2 * len(PROMPTS) for number in range(len(CHOICES))]
MIXED = [[*range(4), *range(4), *range(4)], [2, 2, 1, 0, 3, 2, 0, 1, 1, 2, 2, 3]]

ASSIGNMENTS = [EVERY_LABEL_ALIKE[0], EVERY_LABEL_ALIKE[2], *MIXED]


@pytest.mark.parametrize("mode", MODES)
def test_no_label_shows_in_what_crosses(mode: str, folder: Path, tmp_path: Path) -> None:
    runs = [
        sent_in_a_run(folder, tmp_path / str(number), labels, **MODES[mode])
        for number, labels in enumerate(ASSIGNMENTS)
    ]
    assert all(run == runs[0] for run in runs)
    kinds = {kind for looks in runs[0] for kind, _ in looks}
    assert {"Forward", "Commit", "Update"} <= kinds


@settings(derandomize=True, deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, len(CHOICES) - 1), min_size=2 * len(PROMPTS), max_size=2 * len(PROMPTS)))
def test_no_assignment_of_labels_shows(folder: Path, tmp_path_factory: pytest.TempPathFactory, labels: Labels) -> None:
    base = tmp_path_factory.mktemp("labels")
    expected = sent_in_a_run(folder, base / "expected", EVERY_LABEL_ALIKE[0])
    assert sent_in_a_run(folder, base / "other", labels) == expected


SENSITIVE: dict[str, Any] = {
    "field": {"fields": {"label": "high"}},
    "one choice's word": {"detectors": {"name": "high"}},
    "prompt and choice together": {"function": "tests.hostile.test_labels_by_lengths:pairs"},
}


def pairs(text: str) -> list[tuple[int, int, str]]:
    """A sensitivity function: the last word of some prompts with the first of some answers."""
    return [(one.start(), one.end(), "high") for one in re.finditer(r"w(13|38)(w6[13]|w71)", text)]


@pytest.mark.parametrize("choices", [CHOICES, LONE], ids=["unequal", "one token"])
@pytest.mark.parametrize("kind", SENSITIVE)
def test_no_label_shows_in_noise_or_budgets(
    kind: str, choices: Sequence[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By sensitivity a token's class says how much noise it gets, and what budget its record has."""
    names = tmp_path / "names.txt"
    names.write_text("w62\nw71\n")
    section = {**SENSITIVE[kind], "classes": {"high": {"noise": 3.0, "epsilon": 3e7}}}
    if "detectors" in section:
        section["names"] = str(names)
    noised = {"boundary": dict.fromkeys(("forward", "gradient"), NOISED)}
    given: list[Any] = []
    release = Boundary.release

    def noted(self: Boundary, h_TD: torch.Tensor, path: Any, step: int, subjects: Subjects) -> Any:
        assert subjects.factors_T is not None
        given[-1].append((path, step, subjects.lengths, subjects.factors_T.tolist(), subjects.budgets))
        return release(self, h_TD, path, step, subjects)

    monkeypatch.setattr(Boundary, "release", noted)
    for number, labels in enumerate(ASSIGNMENTS):
        given.append([])
        sections = {**noised, "sensitivity": section, "task": {"choices": choices}}
        sent_in_a_run(folder, tmp_path / str(number), labels, **sections)
    assert given[0]
    assert all(one == given[0] for one in given)
    found = {factor for *_, factors, _ in given[0] for factor in factors}
    assert len(found) == (2 if choices == CHOICES or "together" in kind else 1)


def tokens_of(recipe: Recipe) -> list[Tokens]:
    return SiloData(recipe.silo[0], recipe, load_tokenizer(Path(recipe.model.path))).train


def slow_step(twins: Twins, rows: list[Tokens]) -> tuple[float, Tensors]:
    """Loss and gradients of the uncut model on single rows without padding or filler: each answer's summed loss, by
    the tokens of as many longest choices."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row.prompt + row.answer])
        logs_LV = twins.whole(input_ids=ids).logits[0].log_softmax(dim=-1)
        first = len(row.prompt) - 1
        total -= sum((logs_LV[first + n, token] for n, token in enumerate(row.answer)), torch.zeros(()))
    loss = total / (LONGEST * len(rows))
    loss.backward()
    return float(loss.detach()), {name: one.grad for name, one in lora_of(twins.whole).items() if one.grad is not None}


def single(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> Any:
    return train_step(model, optimizer, batch)


def in_parts(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> Any:
    return pipelined_step(model, optimizer, batch, 3)


@pytest.mark.parametrize("step", [single, in_parts])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("labels", ASSIGNMENTS)
def test_loss_and_gradients_are_the_uncut_models_without_filler(
    family: str, step: Any, labels: Labels, tmp_path: Path
) -> None:
    recipe = recipe_of(save_vivid_model(family, tmp_path / "model"), tmp_path, labels)
    rows = tokens_of(recipe)
    twins = make_twins(recipe, tmp_path / "trunk")
    try:
        twins.rounds.begin(1, ["a"])
        trained = [one for part in twins.split.ends for one in part.model.parameters() if one.requires_grad]
        made = step(twins.split, torch.optim.SGD(trained, lr=0.0), collate(rows, 0))
        loss, expected = slow_step(twins, rows)
        assert made.loss == pytest.approx(loss, rel=1e-5)
        assert made.weight == LONGEST * len(rows)
        assert_same(twins.split_gradients(), expected, 1e-4)
    finally:
        twins.close()


def test_silos_of_other_labels_are_training_on_all_rows(tmp_path: Path) -> None:
    """The weighted mean over silos is exact, though weights say nothing of the labels."""
    recipe = pooled.federation_of(save_vivid_model("llama", tmp_path / "model"), tmp_path)
    texts = (Path(section.train[0]).read_text() for section in recipe.silo)
    choices = [" " + json.loads(line)["reply"] for text in texts for line in text.splitlines()]
    longest = max(len(choice.split()) for choice in choices)
    recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update={"choices": tuple(choices)})})
    run = RunDirectory.create(tmp_path / "run", recipe)
    trunk, ends = pooled.federate(recipe, run)
    start = run.role("trunk").load_round(0)["adapter"]
    start |= adapters.initial_tensors(Checkpoint(recipe.model.path).config, recipe)
    whole = lora_of(pooled.train_uncut(recipe, start, [{name for name in ends[0] if "lora_A" in name}] * 3))
    assert_same(trunk | ends[0], {name: value.detach() for name, value in whole.items()}, 1e-5)
    for line in read_journal(run.role("root").path / "metrics.jsonl"):
        assert line["weights"] == dict.fromkeys(pooled.SILOS, 3.0 * longest)
