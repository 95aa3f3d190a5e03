"""Distilling a draft: the split model's own answers, a bridge that learns them, and messages on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus.data.tokens import Tokens
from isthmus.silo.drafting.bridge import Bridge
from isthmus.silo.drafting.distil import distil, record_answers, train_bridge
from isthmus.silo.join import Silo, join
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from tests.conftest import make_recipe, save_tiny_model
from tests.oracle.twins import loopback

ROWS = [Tokens([5, 6, 7], []), Tokens([9], []), Tokens([12, 13], [])]
LONGEST = 4


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def silo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Silo]:
    folder: Path = tmp_path_factory.mktemp("distil")
    model = save_tiny_model("llama", folder / "model", initializer_range=0.3)
    recipe = make_recipe(model, model={"dtype": request.param})
    service = TrunkService(recipe, RoleDirectory(folder / "trunk"))
    joined = join(recipe, "a", channel=loopback(service, "a", recipe))
    yield joined
    joined.close()
    service.stop()


def test_answers_are_the_models_with_what_crossed(silo: Silo) -> None:
    found = {record.prompt: record for record in record_answers(silo.model, ROWS, 0, longest=LONGEST)}
    assert set(found) == {3, 1, 2}
    for row in ROWS:
        record = found[len(row.prompt)]
        alone = silo.model.generate(torch.tensor([row.prompt]), max_new_tokens=LONGEST, do_sample=False, pad_token_id=0)
        assert record.ids_L.tolist() == alone[0].tolist()
        assert len(record.h_LD) == len(record.g_LD) == len(record.ids_L) - 1


def test_a_bridge_learns_and_says_how_far_it_is(silo: Silo) -> None:
    torch.manual_seed(0)
    records, losses = list(record_answers(silo.model, ROWS, 0, longest=LONGEST)), list[float]()
    bridge, words = Bridge(silo.model.bottom), torch.unique(torch.cat([record.ids_L for record in records]))
    train_bridge(
        bridge, silo.model.top, words, records, lambda step, steps, loss: losses.append(loss), epochs=30, batch=3
    )
    assert losses[-1] < losses[0]


def test_a_draft_knows_its_answers(silo: Silo) -> None:
    messages: list[str] = []
    draft, corpus = distil(silo, ROWS, longest=LONGEST, notify=messages.append)
    assert sorted(prompt for _, prompt in corpus) == [1, 2, 3]
    assert messages[0] == "answered 3 of 3 prompts"
    assert draft.corpus is not None


def test_nothing_cannot_be_distilled(silo: Silo) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        distil(silo, [], longest=LONGEST, notify=lambda message: None)
