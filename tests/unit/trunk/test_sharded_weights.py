"""A trunk whose weights several processes hold equals the one that holds them alone; a process that dies is named.

Shapes: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.privacy.ledger import MemoryLedger
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, join
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.trunk.sharded_weights import Ranks, ShardedLinear, shard_weights
from tests.conftest import make_recipe, targets_of
from tests.oracle.twins import batch_of, distance, loopback, prompts, ragged, save_vivid_model
from tests.unit.trunk.ranks import Others, started

pytestmark = pytest.mark.process
TOLERANCE = 1e-5
FAMILIES = ("llama", "gemma2", "qwen2", "phi3", "mixtral")
UNEVEN = {"intermediate_size": 50}
"""Four ranks cannot have as many rows each."""
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[2, 4])
def others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Others]:
    with started(request.param, tmp_path_factory.mktemp("ranks")) as found:
        yield found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {
        family: save_vivid_model(family, base / family, **({} if family == "mixtral" else UNEVEN))
        for family in FAMILIES
    }


def sharded(ranks: Ranks, model: Path, cut: Cut, dtype: torch.dtype = torch.float32) -> Part:
    """A trunk's part without adapters, whose layers the ranks hold."""
    ranks.load(cut)
    part = load_part(Checkpoint(str(model)), cut, "trunk", dtype=dtype, share=ranks.share)
    shard_weights(part, list(part.plain_layers()), ranks)
    ranks.wait_loaded()
    return part


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_layer_is_the_whole_one(
    family: str, dtype: str, tolerance: float, others: Others, folders: dict[str, Path]
) -> None:
    """Results and gradients, for no token, one and several; qwen2 has biases."""
    kind, cut = getattr(torch, dtype), Cut(1, 1)
    part = sharded(others.use(folders[family], dtype), folders[family], cut, kind)
    whole = load_part(Checkpoint(str(folders[family])), cut, "trunk", dtype=kind)
    draw = torch.Generator().manual_seed(0)
    for name, layer in whole.plain_layers().items():
        own = part.model.get_submodule(name)
        assert isinstance(own, ShardedLinear)
        for tokens in (0, 1, 7):
            x_1TK = torch.randn(1, tokens, layer.in_features, generator=draw).to(kind).requires_grad_()
            g_1TN = torch.randn(1, tokens, layer.out_features, generator=draw).to(kind)
            results = [own(x_1TK), layer(x_1TK)]
            gradients = [torch.autograd.grad(y_1TN, x_1TK, g_1TN)[0] for y_1TN in results]
            assert results[0].dtype == kind
            for found, expected in (results, gradients):
                assert found.shape == expected.shape
                assert not tokens or distance(found.detach(), expected.detach()) < tolerance


def test_a_rank_holds_its_rows_alone(others: Others, folders: dict[str, Path]) -> None:
    ranks = others.use(folders["llama"])
    part = sharded(ranks, folders["llama"], Cut(1, 1))
    layers = [one for one in part.modules() if isinstance(one, ShardedLinear)]
    assert len(layers) == 3 * 7
    for layer in layers:
        assert len(layer.weight) == ranks.share.size(layer.out_features)
        assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes, "no view into a whole weight"


def test_the_ranks_load_another_cut(others: Others, folders: dict[str, Path]) -> None:
    """As a trunk does whose cut moves."""
    folder = folders["llama"]
    for cut in (Cut(1, 1), Cut(2, 1), Cut(1, 3)):
        part = sharded(others.use(folder), folder, cut)
        whole = load_part(Checkpoint(str(folder)), cut, "trunk")
        name, layer = list(whole.plain_layers().items())[-1]
        x_TK = torch.randn(3, layer.in_features)
        assert distance(part.model.get_submodule(name)(x_TK), layer(x_TK)) < 1e-6


def test_an_error_of_rank_0_leaves_no_reply_behind(others: Others, folders: dict[str, Path]) -> None:
    ranks = others.use(folders["llama"])
    part = sharded(ranks, folders["llama"], Cut(1, 1))
    layer = next(one for one in part.modules() if isinstance(one, ShardedLinear))
    x_TK = torch.randn(2, layer.in_features)
    before = layer(x_TK)
    with pytest.raises(RuntimeError, match="shape"):
        ranks.multiply(layer.number, 5 * x_TK, torch.zeros(3, 3), layer.out_features)
    assert torch.equal(layer(x_TK), before)


class Pair:
    """A silo with a trunk that holds its weights alone, and the same with one whose ranks hold them."""

    def __init__(self, recipe: Recipe, ranks: Ranks, folder: Path) -> None:
        self.services = [
            TrunkService(recipe, RoleDirectory(folder / "alone")),
            TrunkService(recipe, RoleDirectory(folder / "shared"), ranks=ranks),
        ]
        self.silos: list[Silo] = [
            join(recipe, "a", channel=loopback(service, "a", recipe), ledger=MemoryLedger())
            for service in self.services
        ]

    def adapters(self) -> list[Tensors]:
        return [adapters.adapter_of(service._runner.part) for service in self.services]

    def close(self) -> None:
        for service in self.services:
            service.stop()


def trained(silos: Sequence[Silo], steps: int) -> dict[str, float]:
    """Training steps of both silos, and how far their losses are apart."""
    optimizers = []
    for silo in silos:
        silo.rounds.begin(1, ["a"])
        optimizers.append(torch.optim.AdamW([one for one in silo.model.parameters() if one.requires_grad], lr=5e-4))
    far = {}
    for number in range(1, steps + 1):
        batch = batch_of(ragged("left", seed=number))
        pairs = zip(silos, optimizers, strict=True)
        alone, shared = (train_step(silo.model, optimizer, batch) for silo, optimizer in pairs)
        assert alone.loss is not None
        assert shared.loss is not None
        far[f"loss {number}"] = abs(shared.loss - alone.loss)
        for silo in silos:
            silo.rounds.commit(1, number, alone.weight)
    return far


@pytest.mark.parametrize(
    ("family", "trunk"), [*((family, {}) for family in FAMILIES), ("llama", {"adapter": "replica", "average_every": 1})]
)
def test_a_shared_trunk_equals_one_alone(
    family: str, trunk: dict[str, Any], others: Others, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Logits, losses and adapters of training, generated tokens with and without a cache. Replicas freeze A."""
    recipe = make_recipe(folders[family], lora={"targets": targets_of(family)}, trunk=trunk)
    pair = Pair(recipe, others.use(folders[family]), tmp_path)
    inputs = ragged("left")
    with torch.no_grad():
        alone, shared = (silo.model(**inputs, use_cache=False).logits for silo in pair.silos)
    real = inputs["attention_mask"].bool()
    far, before = {"logits": distance(shared[real], alone[real])}, pair.adapters()[0]
    far |= trained(pair.silos, 3)
    expected, found = pair.adapters()
    far |= {name: float((found[name] - one).abs().max()) for name, one in expected.items()}
    assert max(far.values()) < TOLERANCE, far
    moved = {name for name, one in expected.items() if not torch.equal(one, before[name])}
    assert moved == {name for name in expected if not trunk or "lora_B" in name}
    for cached in (True, False):
        how = {"max_new_tokens": 8, "do_sample": False, "use_cache": cached}
        assert torch.equal(*(silo.model.generate(**prompts(), **how) for silo in pair.silos))
    pair.close()
