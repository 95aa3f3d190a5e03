"""A trunk whose blocks several processes hold computes the very numbers of one that holds them alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.model import adapters
from isthmus.privacy.ledger import MemoryLedger
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, join
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.ranks import Ranks
from isthmus.trunk.service import TrunkService
from isthmus.trunk.staged_runner import StagedRunner
from tests.conftest import make_recipe, targets_of
from tests.oracle.twins import batch_of, loopback, prompts, ragged, save_vivid_model
from tests.unit.trunk.ranks import Others, started

pytestmark = pytest.mark.process
FAMILIES = ("llama", "gemma2", "qwen2", "phi3", "mixtral")
BLOCKS = 7
"""The trunk has five, which neither two nor four ranks share evenly."""
WIDE = {"hidden_size": 64, "intermediate_size": 64}
"""For weights of few bits."""
KINDS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "replicas": {"trunk": {"adapter": "replica", "average_every": 1}},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "int8": {"trunk": {"weights": "int8"}},
    "int4": {"trunk": {"weights": "int4"}},
    "residual": {"boundary": {"residual": True}},
    "bottleneck": {"boundary": {"width": 8}},
    "dropout": {"lora": {"dropout": 0.3}},
    "no graph is kept": {"trunk": {"stash_bytes": 1}},
    "chunks": {"trunk": {"chunk": 16}},
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[2, 4])
def others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Others]:
    with started(request.param, tmp_path_factory.mktemp("ranks")) as found:
        yield found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    found = {family: save_vivid_model(family, base / family, blocks=BLOCKS) for family in FAMILIES}
    return {**found, "wide": save_vivid_model("llama", base / "wide", blocks=BLOCKS, **WIDE)}


class Pair:
    """Silos with a trunk alone, and the same silos with one over ranks."""

    def __init__(self, recipe: Recipe, ranks: Ranks, folder: Path) -> None:
        self.services = [
            TrunkService(recipe, RoleDirectory(folder / "alone")),
            TrunkService(recipe, RoleDirectory(folder / "ranks"), ranks=ranks),
        ]
        self.silos: list[dict[str, Silo]] = [
            {
                one.name: join(recipe, one.name, channel=loopback(service, one.name, recipe), ledger=MemoryLedger())
                for one in recipe.silo
            }
            for service in self.services
        ]

    def of(self, name: str) -> list[Silo]:
        return [silos[name] for silos in self.silos]

    @property
    def runner(self) -> StagedRunner:
        found = self.services[1]._runner
        assert isinstance(found, StagedRunner)
        return found

    def adapters(self) -> list[Tensors]:
        return [adapters.adapter_of(service._runner.part) for service in self.services]

    def close(self) -> None:
        for service in self.services:
            service.stop()


@pytest.fixture
def pairs(others: Others, tmp_path: Path) -> Iterator[Any]:
    made: list[Pair] = []

    def pair(recipe: Recipe) -> Pair:
        made.append(Pair(recipe, others.use(recipe), tmp_path / str(len(made))))
        return made[-1]

    yield pair
    for one in made:
        one.close()


def assert_trained_alike(pair: Pair, name: str = "a", *, round: int = 1, steps: int = 3) -> None:
    """Losses and the trunk's adapter after each step, and that the adapter moved."""
    silos, before = pair.of(name), pair.adapters()[0]
    optimizers = []
    for silo in silos:
        silo.rounds.begin(round, [name])
        optimizers.append(torch.optim.AdamW([one for one in silo.model.parameters() if one.requires_grad], lr=5e-4))
    for number in range(1, steps + 1):
        batch = batch_of(ragged("left", seed=number))
        alone, ranks = (
            train_step(silo.model, optimizer, batch) for silo, optimizer in zip(silos, optimizers, strict=True)
        )
        assert ranks.loss == alone.loss
        for silo in silos:
            silo.rounds.commit(round, number, alone.weight)
        expected, found = pair.adapters()
        assert all(torch.equal(found[one], tensor) for one, tensor in expected.items())
    assert any(not torch.equal(one, before[name]) for name, one in expected.items())
    for alone, ranks in zip(*(adapters_of_ends(silo) for silo in silos), strict=True):
        assert torch.equal(alone, ranks)


def adapters_of_ends(silo: Silo) -> list[torch.Tensor]:
    return [one for part in silo.model.ends for one in adapters.adapter_of(part).values()]


def assert_logits_alike(silos: Sequence[Silo]) -> None:
    inputs = ragged("left")
    with torch.no_grad():
        alone, ranks = (silo.model(**inputs, use_cache=False).logits for silo in silos)
    real = inputs["attention_mask"].bool()
    assert torch.equal(ranks[real], alone[real])


def assert_answers_alike(silos: Sequence[Silo]) -> None:
    """Logits; greedy tokens with and without a cache; beams, which copy caches; drafts, which drop what is wrong."""
    assert_logits_alike(silos)
    ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"num_beams": 3}]
    for way in ways:
        how = {"max_new_tokens": 8, "do_sample": False, **way}
        assert torch.equal(*(silo.model.generate(**prompts(), **how) for silo in silos)), way
    one = {name: tensor[-1:] for name, tensor in prompts().items()}
    how = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 3}
    assert torch.equal(*(silo.model.generate(**one, **how) for silo in silos))


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, "as it is") for family in FAMILIES[1:]), *(("llama", kind) for kind in KINDS)],
)
def test_a_trunk_over_ranks_is_one_alone(family: str, kind: str, pairs: Any, folders: dict[str, Path]) -> None:
    model = folders["wide" if kind.startswith("int") else family]
    keys = {"lora": {"targets": targets_of(family)}, **KINDS[kind]}
    pair = pairs(make_recipe(model, **keys))
    silos = pair.of("a")
    assert_logits_alike(silos)
    assert_trained_alike(pair)
    assert_answers_alike(silos)


def test_silos_with_cuts_of_their_own_pass_some_ranks_alone(pairs: Any, folders: dict[str, Path]) -> None:
    """Each passes the blocks that it leaves to the trunk; of ranks without one of those nothing is asked."""
    own = [{"name": "a", "train": "a.jsonl"}, {"name": "b", "train": "b.jsonl", "bottom": 3, "top": 1}]
    one_step = {"rounds": 3, "steps": 1}
    recipe = make_recipe(
        folders["llama"], train=one_step, silo=[*own, {"name": "c", "train": "c.jsonl", "bottom": 1, "top": 3}]
    )
    pair = pairs(recipe)
    for round, name in enumerate(("a", "b", "c"), 1):
        assert_trained_alike(pair, name, round=round, steps=1)
        assert_answers_alike(pair.of(name))


def test_a_rank_has_weights_and_caches_of_its_own_blocks_alone(pairs: Any, folders: dict[str, Path]) -> None:
    pair = pairs(make_recipe(folders["llama"]))
    runner, whole = pair.runner, pair.services[0]._runner
    own = runner._own
    for name, one in runner.part.model.named_parameters():
        block = runner.part.own_block(name)
        if "lora" not in name and block is not None:
            assert one.untyped_storage().nbytes() == (one.nbytes if block in own else one.element_size()), name
    alone, cache = whole.new_cache("a"), runner.new_cache("a")
    for each in (alone, cache):
        each.reserve(100)
    assert (cache.nbytes, cache.bytes_for(1000)) == (alone.nbytes, alone.bytes_for(1000)), "those of all ranks count"
    assert cache._kv.nbytes * (BLOCKS - 2) == alone._kv.nbytes * len(own)


def test_what_rank_0_has_no_more_no_rank_keeps(pairs: Any, folders: dict[str, Path]) -> None:
    """Caches of closed sessions, and graphs whose backward never comes, are freed with the next order."""
    pair = pairs(make_recipe(folders["llama"]))
    silo = pair.of("a")[1]
    stages = pair.runner._stages
    silo.model.generate(**prompts(), max_new_tokens=3, do_sample=False)
    silo.model(**ragged("left"))  # trains, and is forgotten
    silo.rounds.begin(1, ["a"])
    gc.collect()
    pair.services[1]._sessions.close_all("a")
    pair.services[1]._training.forget("a")
    gc.collect()
    freed = {what for stage in stages for what, *_ in stage.tidy}
    assert freed == {"cache", "graph"}
    with torch.no_grad():
        silo.model(**ragged("left"), use_cache=False)
    assert not any(stage.tidy for stage in stages)
