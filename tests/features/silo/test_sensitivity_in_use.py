"""Sensitivity from the recipe to the wire: more noise at sensitive tokens, less of them elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import collate
from isthmus.errors import BudgetExhausted, DataError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.packing import Packing
from isthmus.privacy.averted_attention import averted_hidden
from isthmus.privacy.ledger import MemoryLedger
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, greeting, join, load_data
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import make_recipe, targets_of, write_rows
from tests.oracle.conftest import models  # noqa: F401
from tests.oracle.twins import FAMILIES, distance
from tests.unit.silo.parties import Tap

NOISE = 0.5
CLASSES = {"high": {"noise": 3.0}, "low": {"noise": 0.5}}
SECTION: dict[str, Any] = {"detectors": ["name"], "fields": {"who": "high", "note": "low"}, "classes": CLASSES}
TASK = {"prompt": "{who} w4 w5 w6 {note} w7", "answer": "{told}"}
ROWS = [
    {"who": f"w{20 + n} w{30 + n}", "note": " ".join(f"w{40 + m}" for m in range(n + 1)), "told": f"w{60 + n} w90 w8"}
    for n in range(5)
]
CALIBRATED = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 1.0, "delta": 1e-5, "unit": "sequence"}
BOUNDED = {"forward": CALIBRATED, "gradient": CALIBRATED}
SENSITIVE = {*range(20, 25), *range(30, 35), 90}
LITTLE = set(range(40, 46))


class Running:
    """A silo with its rows, joined to a trunk of its own; its wire is tapped, and what its bottom gave is kept."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.service = TrunkService(recipe, RoleDirectory(folder / "trunk"))
        self.tap = Tap(self.service, "a", greeting=greeting(Checkpoint(recipe.model.path), recipe))
        places = {"releases": folder / "silo" / "released", "records": folder / "silo" / "records"}
        self.silo: Silo = join(recipe, "a", ledger=MemoryLedger(), channel=self.tap, **places)
        self.data: SiloData = load_data(recipe, "a", self.silo)
        self.optimizer = torch.optim.SGD([p for p in self.silo.model.parameters() if p.requires_grad], lr=0.1)
        self.clean: list[torch.Tensor] = []
        self.ids: list[torch.Tensor] = []
        bottom = self.silo.model.bottom
        bottom.family.backbone_of(bottom.model).register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, arguments: Any, inputs: dict[str, Any], output: Any) -> None:
        ids_BL = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        real_BL = torch.ones(ids_BL.shape) if mask is None else mask[:, -ids_BL.shape[1] :]
        self.clean.append(Packing(real_BL.bool()).pack(output.last_hidden_state.detach()))
        self.ids.append(ids_BL[real_BL.bool()])

    def train(self, micro_batches: int = 1) -> float:
        self.tap.__dict__.setdefault("sent", [])
        self.silo.rounds.begin(1, ["a"])
        batch = collate(self.data.train, 0)
        if micro_batches == 1:
            return train_step(self.silo.model, self.optimizer, batch).loss
        return pipelined_step(self.silo.model, self.optimizer, batch, micro_batches).loss

    def noise(self, kind: type[Any]) -> torch.Tensor:
        """What was added to the clean states, ``[T, D]``."""
        sent = [
            codec.decode(m.hidden, rows=m.hidden.rows, width=m.hidden.width, codec="fp32") for m in self.tap.take(kind)
        ]
        return torch.cat(sent) - torch.cat(self.clean)

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.silo.model(**collate(self.data.train, 0).inputs(), use_cache=False).logits


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path, models: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:  # noqa: F811
    """``start("mistral", noise=0.5, attention=2.0)``; ``sensitivity=None`` for a recipe without it."""
    running: list[Running] = []
    # transformers gives some families a tokenizer of their own, which splits no words
    monkeypatch.setattr("isthmus.silo.join.load_tokenizer", PreTrainedTokenizerFast.from_pretrained)
    names = tmp_path / "names.txt"
    names.write_text("w90\n")
    train = str(write_rows(tmp_path / "rows.jsonl", ROWS))

    def one(family: str = "llama", *, noise: float = 0.0, sensitivity: Any = SECTION, **more: Any) -> Running:
        own = more.pop("section", {})
        asked = {} if sensitivity is None else {"sensitivity": {**sensitivity, "names": str(names), **own}}
        sections = {"task": TASK, "silo": [{"name": "a", "train": train}], "lora": {"targets": targets_of(family)}}
        for key, value in more.items():
            sections[key] = {**sections.get(key, {}), **value}
        boundary = {"forward": {"noise": noise}, **sections.pop("boundary", {})}
        recipe = make_recipe(models(family), **sections, **asked, boundary=boundary, train={"steps": 99})
        running.append(Running(recipe, tmp_path / f"running{len(running)}"))
        return running[-1]

    yield one
    for each in running:
        each.service.stop()


def of(tokens: set[int], ids_T: torch.Tensor) -> torch.Tensor:
    return torch.tensor([token in tokens for token in ids_T.tolist()])


def test_noise_in_captured_frames_follows_the_classes_and_keeps_its_average(start: Start) -> None:
    one = start(noise=NOISE)
    for _ in range(8):
        one.train()
    drawn, ids_T = one.noise(pb.Forward), torch.cat(one.ids)
    high, low = of(SENSITIVE, ids_T), of(LITTLE, ids_T)
    rest = ~high & ~low
    assert min(int(mask.sum()) for mask in (high, low, rest)) > 40
    assert drawn[high].std() / drawn[rest].std() == pytest.approx(3.0, rel=0.08)
    assert drawn[low].std() / drawn[rest].std() == pytest.approx(0.5, rel=0.08)
    assert drawn.square().mean().sqrt() == pytest.approx(NOISE, rel=0.05)


def test_the_gradients_noise_follows_the_same_classes(start: Start) -> None:
    """So large a noise that the gradient itself does not count."""
    one = start(boundary={"gradient": {"noise": 1e4}})
    one.optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(8):
        one.train()
    sent = [
        codec.decode(m.gradient, rows=m.gradient.rows, width=m.gradient.width, codec="fp32")
        for m in one.tap.take(pb.Backward)
    ]
    drawn, high = torch.cat(sent), of(SENSITIVE, torch.cat(one.ids))
    rest = ~high & ~of(LITTLE, torch.cat(one.ids))
    assert drawn[high].std() / drawn[rest].std() == pytest.approx(3.0, rel=0.08)


@pytest.mark.parametrize("attention", [0.0, 4.0])
def test_noise_of_generated_text_follows_what_is_found_in_it(start: Start, attention: float) -> None:
    """The prompt is of the data, and its field is known; what is generated holds names of the list now and then."""
    one = start(noise=NOISE, section={"attention": attention})
    prompt = torch.tensor([one.data.train[1].prompt])
    one.silo.model.generate(
        input_ids=prompt,
        min_new_tokens=200,
        max_new_tokens=200,
        do_sample=True,
        temperature=5.0,
        num_return_sequences=3,
    )
    drawn, ids_T = one.noise(pb.Decode), torch.cat(one.ids)
    first = 3 * prompt.shape[1]
    listed = of({90}, ids_T)
    known = torch.cat([of(SENSITIVE, ids_T[:first]), listed[first:]])
    assert int(listed[first:].sum()) > 1
    rest = ~known & ~torch.cat([of(LITTLE, ids_T[:first]), torch.zeros(len(ids_T) - first, dtype=torch.bool)])
    assert drawn[known].std() / drawn[rest].std() == pytest.approx(3.0, rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_nothing_changes_bit_for_bit(start: Start, family: str) -> None:
    plain = start(family, sensitivity=None).logits()
    assert torch.equal(start(family).logits(), plain)
    nobody = {"detectors": {}, "names": None, "fields": {}, "attention": 5.0}
    harmless = start(family, sensitivity={"classes": CLASSES}, section=nobody)
    assert harmless.silo.model.shield is not None
    assert torch.equal(harmless.logits(), plain)
    assert not torch.equal(start(family, section={"attention": 5.0}).logits(), plain)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@torch.no_grad()
def test_generation_averts_attention_as_one_pass_would(start: Start, family: str) -> None:
    """Token by token with a cache, beyond the sliding windows: bottom gives what it gives the finished text."""
    one = start(family, section={"attention": 3.0})
    records = one.silo.boundary.records
    assert records.sensitivity is not None
    prompt = torch.tensor([one.data.train[4].prompt])
    one.silo.model.generate(input_ids=prompt, min_new_tokens=30, max_new_tokens=30, do_sample=False)
    ids_T, h_TD = torch.cat(one.ids), torch.cat(one.clean)
    assert len(ids_T) == prompt.shape[1] + 29
    classes = records.classes([ids_T.tolist()])
    assert classes is not None
    a_P = 3.0 * records.sensitivity.aversions[torch.tensor(classes[0])]
    assert a_P.max() == 9.0
    whole = averted_hidden(one.silo.model.bottom, a_P[None], input_ids=ids_T[None], use_cache=False)
    assert distance(h_TD, whole[0]) < 1e-5


@pytest.mark.parametrize("lookup", [None, 3])
@torch.no_grad()
def test_rejected_guesses_leave_no_trace(start: Start, lookup: int | None) -> None:
    one = start(section={"attention": 3.0})
    prompt = torch.tensor([one.data.train[4].prompt * 3])
    how = {"min_new_tokens": 30, "max_new_tokens": 30, "do_sample": False}
    guessed = one.silo.model.generate(input_ids=prompt, **how, prompt_lookup_num_tokens=lookup)
    assert torch.equal(guessed, one.silo.model.generate(input_ids=prompt, **how, use_cache=False))
    assert any(request.forget for request in one.tap.take(pb.Decode)) is (lookup is not None)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_batches_beams_and_no_cache_give_the_same_text(start: Start, family: str) -> None:
    one = start(family, section={"attention": 3.0})
    batch = collate(one.data.train, 0)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    for settings in ({}, {"num_beams": 3}):
        how = {"min_new_tokens": 20, "max_new_tokens": 20, "do_sample": False, **settings}
        cached, plain = (one.silo.model.generate(**inputs, **how, use_cache=use) for use in (True, False))
        assert torch.equal(cached, plain)


def test_micro_batches_and_whole_ones_give_the_same_loss(start: Start) -> None:
    losses = [start(section={"attention": 3.0}).train(micro_batches) for micro_batches in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(start().train(), rel=1e-3)


def test_examples_released_once_are_noised_and_averted_alike(start: Start) -> None:
    sections: dict[str, Any] = {"lora": {"freeze_bottom": True}, "section": {"attention": 3.0}}
    often, once = start(**sections), start(**sections, boundary={"release_once": True})
    assert distance(once.logits(), often.logits()) < 1e-5
    noisy = start(**sections, noise=NOISE, boundary={"release_once": True})
    for _ in range(3):
        noisy.train()
    drawn = noisy.silo.boundary.records.subjects([[20, 4]], [2])
    assert drawn.factors_T is not None
    assert len(noisy.tap.take(pb.Keep)) == len(ROWS)


def test_the_budget_of_a_row_is_that_of_its_most_sensitive_text(start: Start) -> None:
    one = start(section={"classes": {"high": {"epsilon": 4.0}, "low": {"epsilon": 5.0}}}, boundary=BOUNDED)
    rows = [row.prompt for row in one.data.train]
    assert one.silo.boundary.records.subjects(rows, [1] * len(rows)).budgets == (4.0,) * len(rows)


def test_a_classes_budget_stops_its_records_alone(start: Start) -> None:
    """A release costs an epsilon of 1, two cost 1.5 together, three 1.8: rows of the class bear two."""
    own = {"fields": {"who": "low"}, "detectors": {}, "names": None, "classes": {"low": {"epsilon": 1.6}}}
    one = start(section=own, boundary=BOUNDED)
    known, other = [row.input for row in one.data.train], [[4, 5, 6]]
    for _ in range(2):
        with torch.no_grad():
            one.silo.model(input_ids=torch.tensor(known[:1]), use_cache=False)
            one.silo.model(input_ids=torch.tensor(other), use_cache=False)
    both = [*known[:2], *other]
    lengths = list(map(len, both))
    assert one.silo.boundary.affordable(both, lengths, gradients=0) == [False, True, True]
    with torch.no_grad(), pytest.raises(BudgetExhausted) as caught:
        one.silo.model(input_ids=torch.tensor(known[:1]), use_cache=False)
    assert "sensitivity.classes" in caught.value.remedy


@pytest.mark.parametrize("body", ["raise ValueError('no')", "return [(0, 10**6, 'high')]", "return 7"])
def test_a_function_that_fails_on_the_data_stops_the_silo_at_its_start(start: Start, tmp_path: Path, body: str) -> None:
    (tmp_path / "mine.py").write_text(f"def look(text):\n    {body}\n")
    with pytest.raises(DataError, match=r"mine\.py:look"):
        start(section={"function": f"{tmp_path}/mine.py:look"})


def test_nothing_of_it_is_on_disk_but_key_scale_and_section(start: Start, tmp_path: Path) -> None:
    start().train()
    kept = tmp_path / "running0" / "silo" / "records"
    assert {path.name for path in kept.iterdir()} == {"record-key", "sensitivity.json"}
    assert set(json.loads((kept / "sensitivity.json").read_text())) == {"scale", "section", "digest"}
