"""What a guarded bottom learns to tell, and what the guard keeps."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.data.tokens import Tokens, batches, collate
from isthmus.silo.defence.guard import OWN, Guard
from isthmus.silo.defence.reader import Question, Reader
from isthmus.silo.join import Silo
from isthmus.silo.trainer import train_step
from tests.conftest import VOCABULARY, make_recipe, save_tiny_model
from tests.unit.silo.parties import Party

YES, NO, END = 90, 91, 5
Start = Callable[..., Party]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture
def silo(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Silo]:
    """A silo that trains alone: ``silo(answer=1.0, inverter=2.0)``."""

    def start(**defence: float) -> Silo:
        boundary = {"width": 8, "residual": True, "gradients": False, "forward": {"clip": 2.0, "noise": 0.2}}
        if defence:
            boundary["defence"] = defence
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = {"rank": 16, "alpha": 32.0, "targets": targets}
        recipe = make_recipe(model, model={"bottom": 2, "top": 1}, boundary=boundary, lora=lora)
        party = Party(recipe, tmp_path / f"party{len(list(tmp_path.iterdir()))}")
        request.addfinalizer(party.service.stop)
        return party.silo

    return start


def rows_of(seed: int, count: int) -> list[Tokens]:
    """Six words of a text, a mark, and the answer: whether its second word is an even number."""
    draw = random.Random(seed)
    texts = [[draw.randrange(10, 50) for _ in range(6)] for _ in range(count)]
    return [Tokens([*text, END], [YES if text[1] % 2 else NO]) for text in texts]


def train(silo: Silo, steps: int, start: int = 0) -> list[float]:
    """Returns what the answer cost in each step of a guarded silo, in nats."""
    optimizer = torch.optim.AdamW([p for p in silo.model.parameters() if p.requires_grad], lr=3e-3)
    costs = []
    for rows in itertools.islice(batches(rows_of(0, 256), 32, "train"), start, start + steps):
        train_step(silo.model, optimizer, collate(rows, 0))
        costs += [silo.guard.last_terms.answer] if silo.guard else []
    return costs


@torch.no_grad()
def crossed(silo: Silo, rows: list[Tokens]) -> torch.Tensor:
    """What the trunk sees of rows of one length, row after row, ``[T, W]``."""
    h_BLD = silo.model.bottom.hidden(input_ids=torch.tensor([row.input for row in rows]), use_cache=False)
    z_TW = silo.model._narrowed(h_BLD.flatten(0, 1), None)
    subjects = silo.boundary.records.subjects(None, [len(row.input) for row in rows])
    return silo.boundary.simulated(z_TW, "forward", subjects)


def read(silo: Silo, seed: int = 1) -> float:
    """Share of a text's tokens that somebody else's inverter, which learned on others, tells from what crosses."""
    told, asked = rows_of(seed, 400), rows_of(seed + 1, 100)
    torch.manual_seed(seed)
    reader = Reader(8, torch.eye(VOCABULARY))
    optimizer = torch.optim.Adam(reader.parameters(), 1e-2)
    everything = torch.arange(VOCABULARY)

    def question(rows: list[Tokens]) -> Question:
        tokens = torch.tensor([token for row in rows for token in row.input])
        return Question(torch.arange(len(tokens)), tokens, everything)

    z_TW, lesson = crossed(silo, told), question(told)
    for _ in range(150):
        optimizer.zero_grad()
        reader.loss(z_TW, lesson).backward()
        optimizer.step()
    test, seen_TW = question(asked), crossed(silo, asked)
    text_T = test.tokens_N != END
    with torch.no_grad():
        right_T = reader.scores(seen_TW, everything).argmax(dim=1) == test.tokens_N
    return float(right_T[text_T].float().mean())


def test_a_reader_reads_all_that_there_is() -> None:
    """Four tokens, equally frequent, each with a vector of its own: log 4 nats."""
    draw, tokens = random.Random(0), [number % 4 for number in range(64)]
    reader = Reader(4, torch.eye(VOCABULARY))
    optimizer = torch.optim.Adam(reader.parameters(), 2e-2)
    z_TW = torch.eye(4)[torch.tensor(tokens)]
    for _ in range(200):
        question = Question.of(list(range(64)), tokens, VOCABULARY, draw)
        reader.count(question)
        optimizer.zero_grad()
        reader.loss(z_TW, question).backward()
        optimizer.step()
    assert float(reader.frequency_loss(question).detach()) == pytest.approx(math.log(4), abs=0.01)
    assert float(reader.loss(z_TW, question).detach()) < 0.1


def test_a_guarded_bottom_tells_the_answer_and_less_of_the_text(silo: Callable[..., Silo]) -> None:
    open_silo, guarded = silo(answer=1.0), silo(answer=1.0, inverter=3.0)
    train(open_silo, 150)
    costs = train(guarded, 150)
    assert read(guarded) < 0.6 * read(open_silo)
    assert statistics.fmean(costs[-25:]) < 0.5 * math.log(2)  # noise is drawn anew in each step


@pytest.mark.parametrize("term", ["capacity", "correlation"])
def test_each_term_lowers_what_it_measures(term: str, silo: Callable[..., Silo]) -> None:
    told = []
    for weight in (1e-9, 5.0):
        one = silo(answer=1.0, **{term: weight})
        train(one, 60)
        assert one.guard is not None
        told.append(getattr(one.guard.last_terms, term))
    assert told[1] < 0.7 * told[0]


def test_without_a_defence_there_is_no_guard(silo: Callable[..., Silo]) -> None:
    assert silo().guard is None


def test_nothing_more_leaves_and_no_more_is_charged(silo: Callable[..., Silo]) -> None:
    plain, guarded = silo(), silo(answer=1.0, inverter=1.0, capacity=0.1, correlation=0.1)
    for one in (plain, guarded):
        train(one, 2)
    assert guarded.boundary.released_bytes == plain.boundary.released_bytes
    what = [
        [
            (one.path, one.rows, one.width, [charge.gaussian for charge in one.charges])
            for one in silo.boundary.ledger.releases
        ]
        for silo in (plain, guarded)
    ]
    assert what[0] == what[1]


def test_its_state_goes_on_where_it_was(silo: Callable[..., Silo], tmp_path: Path) -> None:
    one = silo(answer=1.0, inverter=1.0)
    train(one, 3)
    assert one.guard is not None
    torch.save(one.guard.state_dict(), tmp_path / "guard.pt")
    state: dict[str, Any] = torch.load(tmp_path / "guard.pt", weights_only=True)
    other = Guard(one.guard._section, one.boundary, None, torch.zeros(VOCABULARY, 32), seed=5)
    other.load_state_dict(state)
    assert other._draw.random() == one.guard._draw.random()
    assert other.state_dict()["readers"].keys() == state["readers"].keys()
    for name, tensor in other.state_dict()["readers"].items():
        assert torch.equal(tensor, state["readers"][name])
    other.load_state_dict({})
    assert other.state_dict() == {}
    assert f"{OWN}._into.weight" in state["readers"]
