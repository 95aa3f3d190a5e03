"""The exactness of ``tests/oracle``, with the trunk in a process of its own behind gRPC and mTLS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from isthmus.engines.local import at_address, local_recipe, serving
from isthmus.model import adapters
from isthmus.silo.join import Silo, join
from isthmus.storage.record import RunDirectory
from tests.conftest import make_recipe, uncut
from tests.oracle.twins import (
    assert_same,
    freeze_a,
    load_lora,
    lora_of,
    prompts,
    ragged,
    save_vivid_model,
    with_lora,
)

pytestmark = pytest.mark.process
STEPS, RATE = 10, 1e-2


@dataclass(frozen=True)
class Pair:
    silo: Silo
    whole: PeftModel
    run: RunDirectory


@pytest.fixture(params=[(1, 1), (2, 2)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """A silo connected to a trunk process, and the uncut model with the same fresh adapters."""
    bottom, top = request.param
    folder = save_vivid_model("llama", tmp_path / "model")
    recipe = make_recipe(
        folder,
        model={"bottom": bottom, "top": top},
        train={"optimizer": "sgd", "learning_rate": RATE, "steps": STEPS},
        threads=1,
    )
    run = RunDirectory.create(tmp_path / "run", local_recipe(recipe, tmp_path / "run"))
    whole = with_lora(uncut(folder), recipe)
    with serving(run) as (_, address):
        silo = join(at_address(run.recipe(), address), "a")
        cut_off = run.role("trunk").load_round(0)["adapter"]
        ends = {name: tensor for part in silo.parts for name, tensor in adapters.adapter_of(part).items()}
        load_lora(whole, {**ends, **cut_off})
        freeze_a(whole, ends)
        yield Pair(silo, whole, run)
        silo.close()


def test_training_and_generation_over_processes(pair: Pair) -> None:
    """Logits, ten optimizer steps with losses, then 200 greedy tokens of a ragged batch with what was learned."""
    batch = ragged("left", lengths=(24, 24, 24))
    with torch.no_grad():
        assert torch.equal(pair.silo.model(**batch).logits, pair.whole(**batch).logits)
    _train(pair)
    learned = {name: tensor for part in pair.silo.parts for name, tensor in adapters.adapter_of(part).items()}
    learned |= pair.run.role("trunk").load_round(1)["adapter"]
    assert_same(learned, {name: tensor.detach() for name, tensor in lora_of(pair.whole).items()}, 0.0)
    split, whole = (
        model.generate(**prompts(), min_new_tokens=200, max_new_tokens=200, do_sample=False)
        for model in (pair.silo.model, pair.whole)
    )
    assert torch.equal(split, whole)


def _train(pair: Pair) -> None:
    models = pair.silo.model, pair.whole
    optimizers = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE) for model in models]
    pair.silo.rounds.begin(1, ["a"])
    for step in range(1, STEPS + 1):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(model(**ragged("left", seed=step, lengths=(20 + step,) * 3)).loss)
            losses[-1].backward()
            optimizer.step()
        assert torch.equal(*losses)
        pair.silo.rounds.commit(1, step, 1.0)
