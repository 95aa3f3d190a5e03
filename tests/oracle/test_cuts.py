"""Silos with different cuts share one trunk: each gets what a trunk of its own cut computes, and trains what an uncut
model trains.

Shapes: T tokens of all sequences, N of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import collate
from isthmus.engines.export import final_adapter
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.model.families import FAMILIES as KNOWN
from isthmus.recipe import LoraSection, Recipe
from isthmus.silo.join import join, load_tokenizer
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.trunk.adapter import full_adapter
from isthmus.trunk.attention_kernels import attend_padded
from isthmus.trunk.runner import Runner
from isthmus.trunk.service import TrunkService
from tests.conftest import MULTIMODAL, make_recipe, targets_of, uncut
from tests.oracle.conftest import Models
from tests.oracle.test_federation import RATE, ROUNDS, federate, train_uncut, write_silos
from tests.oracle.twins import (
    Tensors,
    assert_same,
    distance,
    load_lora,
    loopback,
    lora_of,
    prompts,
    random_b,
    with_lora,
)

BLOCKS = 7
WHOLE = Cut(1, 1)
CUTS = {"north": (1, 1), "east": (2, 2), "south": (1, 2), "west": (3, 1)}
"""Of bottom and top. Blocks 1, 2 and 5 of 7 are some silos' and the trunk's for the others."""
DISPUTED = (1, 2, 5)
LENGTHS = {"north": [3, 20], "east": [23], "south": [1, 17], "west": [16, 2]}
MIX = [length for own in LENGTHS.values() for length in own]
ROUNDING = 2e-5
FAMILIES = [name for name in KNOWN if name not in MULTIMODAL]


def equipped(folder: Path, family: str, cut: Cut) -> Part:
    """A trunk with random adapters, which do not depend on the cut."""
    part = load_part(Checkpoint(str(folder)), cut, "trunk")
    adapters.add_adapter(part, LoraSection(rank=4, targets=tuple(targets_of(family))), 0, freeze_a=False)
    tensors = adapters.adapter_of(part)
    for name in (name for name in sorted(tensors) if "lora_B" in name):
        draw = torch.Generator().manual_seed(sum(name.encode()) + 1000 * int(name.split("layers.")[1].split(".")[0]))
        tensors[name] = 0.3 * torch.randn(tensors[name].shape, generator=draw)
    adapters.load_adapter(part, tensors)
    return part


def shared_runner(folder: Path, family: str, *, residual: bool = False, record: bool = False) -> Runner:
    passed = {name: WHOLE.passed(Cut(*cut), BLOCKS) for name, cut in CUTS.items()}
    return Runner(equipped(folder, family, WHOLE), residual=residual, record=record, passed=passed)


def own_runners(folder: Path, family: str, *, residual: bool = False) -> dict[str, Runner]:
    return {
        name: Runner(equipped(folder, family, Cut(*cut)), residual=residual, record=False) for name, cut in CUTS.items()
    }


def hidden(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


def by_silo(h_TD: torch.Tensor) -> dict[str, torch.Tensor]:
    pieces = torch.split(h_TD, [sum(own) for own in LENGTHS.values()])
    return dict(zip(LENGTHS, pieces, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_shared_pass_is_each_silos_own_blocks(family: str, residual: bool, models: Models) -> None:
    """Whole sequences; then cached ones, in pieces that come in mixed passes; both with a kernel, too."""
    folder = models(family, blocks=BLOCKS)
    shared, own = shared_runner(folder, family, residual=residual), own_runners(folder, family, residual=residual)
    h_TD = hidden(sum(MIX))
    expected = torch.cat([own[name].full_pass(h_ND, LENGTHS[name]) for name, h_ND in by_silo(h_TD).items()])
    passed = [shared.passed(name) for name, lengths in LENGTHS.items() for _ in lengths]
    for kernel in (None, attend_padded) if shared.plan.uniform else (None,):
        shared._kernel = kernel
        assert distance(shared.full_pass(h_TD, MIX, passed=passed), expected) <= ROUNDING
        caches = [shared.new_cache(name) for name, lengths in LENGTHS.items() for _ in lengths]
        assert [cache.blocks for cache in caches] == passed
        rows = list(torch.split(h_TD, MIX))
        got: list[list[torch.Tensor]] = [[] for _ in rows]
        for size in (1, 7, 16):
            left = [(number, row[:size]) for number, row in enumerate(rows) if len(row)]
            rows = [row[size:] for row in rows]
            sizes = [len(piece) for _, piece in left]
            results_TD = shared.cached_pass(
                torch.cat([piece for _, piece in left]), sizes, [caches[number] for number, _ in left]
            )
            for (number, _), result in zip(left, torch.split(results_TD, sizes), strict=True):
                got[number].append(result)
        assert [cache.length for cache in caches] == MIX
        assert distance(torch.cat([piece for row in got for piece in row]), expected) <= ROUNDING


@torch.inference_mode()
def test_recorded_passes_of_one_token_are_each_silos_own_blocks(models: Models) -> None:
    folder = models("llama", blocks=BLOCKS)
    shared, own = shared_runner(folder, "llama", record=True), own_runners(folder, "llama")
    caches = {name: (shared.new_cache(name), own[name].new_cache()) for name in CUTS}
    for seed, tokens in enumerate((70, 1, 1)):
        given = {name: hidden(tokens, 10 * seed + place) for place, name in enumerate(CUTS)}
        got_TD = shared.cached_pass(
            torch.cat(list(given.values())), [tokens] * len(CUTS), [one for one, _ in caches.values()]
        )
        for (name, h_ND), result in zip(given.items(), torch.split(got_TD, tokens), strict=True):
            assert distance(result, own[name].cached_pass(h_ND, [tokens], [caches[name][1]])) <= ROUNDING


@pytest.mark.parametrize("at_once", [False, True])
def test_gradients_of_a_shared_pass_are_each_silos_own(at_once: bool, models: Models) -> None:
    """Each silo with an adapter and dropout masks of its own; blocks that it does not pass have no gradient."""
    folder = models("llama", blocks=BLOCKS)
    shared, own = shared_runner(folder, "llama"), own_runners(folder, "llama")
    shared._groups._at_once = at_once
    given, gradient_TD = by_silo(hidden(sum(MIX))), hidden(sum(MIX), seed=1)
    keys = dict(zip(CUTS, ("a", None, "c", "d"), strict=True))
    leaves: dict[str, Tensors] = {}
    for place, name in enumerate(CUTS):
        draw = torch.Generator().manual_seed(place)
        leaves[name] = {
            key: (one + 0.1 * torch.randn(one.shape, generator=draw)).requires_grad_()
            for key, one in adapters.adapter_of(shared.part).items()
        }
    segments = [(len(given[name]), full_adapter(shared.part, leaves[name])) for name in CUTS]
    passed = [shared.passed(name) for name, lengths in LENGTHS.items() for _ in lengths]
    for part in (shared.part, *(runner.part for runner in own.values())):
        for module in part.modules():
            if isinstance(module, torch.nn.ModuleDict) and "default" in module and hasattr(module["default"], "p"):
                module["default"].p = 0.3
    output_TD = shared.full_pass(torch.cat(list(given.values())), MIX, segments, list(keys.values()), passed)
    wanted = [tensor for one in leaves.values() for tensor in one.values()]
    found = iter(torch.autograd.grad(output_TD, wanted, gradient_TD, allow_unused=True))
    for (name, own_TD), output in zip(by_silo(gradient_TD).items(), by_silo(output_TD).values(), strict=True):
        got = {key: next(found) for key in leaves[name]}
        mine = [key for key in leaves[name] if key in adapters.adapter_parameters(own[name].part)]
        segment = [(len(own_TD), full_adapter(own[name].part, leaves[name]))]
        alone_TD = own[name].full_pass(given[name], LENGTHS[name], segment, [keys[name]])
        expected = torch.autograd.grad(alone_TD, [leaves[name][key] for key in mine], own_TD)
        assert distance(output.detach(), alone_TD.detach()) <= ROUNDING
        assert_same({key: got[key] for key in mine}, dict(zip(mine, expected, strict=True)), 10 * ROUNDING)
        assert all(one is None for key, one in got.items() if key not in mine)


def mixed(model: Path, folder: Path, between: str = "rest", lora: str = "plain", **train: object) -> Recipe:
    silos = [one | dict(zip(("bottom", "top"), CUTS[one["name"]], strict=True)) for one in write_silos(folder)]
    return make_recipe(
        model,
        federation={"lora": lora, "between": between},
        silo=silos,
        lora={"targets": targets_of("llama")},
        model={"bottom": 1, "top": 1},
        task={"prompt": "{text}", "answer": " {reply}"},
        train={"rounds": ROUNDS, "steps": 1, "batch": 3, "learning_rate": RATE, "evaluate": False, **train},
    )


def smooth(models: Models) -> Path:
    """A model in which training does not make rounding errors grow."""
    return models("llama", vivid=False, blocks=BLOCKS, initializer_range=0.1)


def is_disputed(name: str) -> bool:
    return any(f".layers.{block}." in name for block in DISPUTED)


def keeps(silo: str, name: str) -> bool:
    """Whether a silo keeps the block of this tensor."""
    block, (bottom, top) = int(name.split("layers.")[1].split(".")[0]), CUTS[silo]
    return block < bottom or block >= BLOCKS - top


class HandAveraged:
    """Uncut models in one process, one a silo, whose adapters are averaged by hand: those of the trunk's blocks at each
    step, among the silos that leave them to it, and those of blocks that silos keep at each round's end, one more model
    among these, the trunk, counting for the silos that pass its block."""

    def __init__(self, recipe: Recipe, start: Tensors, resting: Callable[[str], bool]) -> None:
        self.recipe, tokenizer = recipe, load_tokenizer(Path(recipe.model.path))
        self.whole = {silo.name: with_lora(uncut(Path(recipe.model.path)), recipe) for silo in recipe.silo}
        self.data = {silo.name: SiloData(silo, recipe, tokenizer) for silo in recipe.silo}
        for one in self.whole.values():
            load_lora(one, start)
        trained = [name for name in sorted(start) if not resting(name)]
        self.kept = {name: [key for key in trained if keeps(name, key)] for name in CUTS}
        self.passed = {name: [key for key in trained if not keeps(name, key)] for name in CUTS}
        self.optimizers = {
            name: self.optimizer([lora_of(one)[key] for key in self.kept[name]]) for name, one in self.whole.items()
        }
        self.trunk = {
            key: torch.nn.Parameter(start[key].clone())
            for key in sorted({key for own in self.passed.values() for key in own})
        }
        self.stepping = self.optimizer(list(self.trunk.values()))

    def optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if self.recipe.train.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=RATE)
        return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    def round(self, number: int) -> None:
        begun = self.adapter()
        weights = dict.fromkeys(self.whole, 0.0)
        parameters = {name: lora_of(one) for name, one in self.whole.items()}
        batches = {name: data.round_batches(number) for name, data in self.data.items()}
        for step in range(self.recipe.train.steps):
            taken = {name: collate(batches[name][step], self.data[name].pad) for name in self.whole}
            for name, batch in taken.items():
                self.whole[name].zero_grad()
                self.whole[name](**batch.inputs()).loss.backward()
                self.optimizers[name].step()
                weights[name] += batch.weight
            for key, one in self.trunk.items():
                passing = {name: batch.weight for name, batch in taken.items() if not keeps(name, key)}
                grads = [weight * parameters[name][key].grad for name, weight in passing.items()]
                one.grad = sum(grads, torch.zeros_like(one)) / sum(passing.values())
            self.stepping.step()
            self.load(parameters, self.trunk, self.passed)
        with torch.no_grad():
            after = {}
            for key in {key for own in self.kept.values() for key in own}:
                changes = [(weights[name], parameters[name][key]) for name in self.whole if keeps(name, key)]
                passing = sum(weights[name] for name in self.whole if not keeps(name, key))
                changes += [(passing, self.trunk[key])] if key in self.trunk else []
                moved = sum((weight * (one - begun[key]) for weight, one in changes), torch.zeros_like(begun[key]))
                after[key] = begun[key] + moved / sum(weight for weight, _ in changes)
            for key in after.keys() & self.trunk.keys():
                self.trunk[key].copy_(after[key])
        self.load(parameters, after, {name: list(after) for name in self.whole})

    @torch.no_grad()
    def load(self, parameters: dict[str, Any], source: Any, keys: dict[str, list[str]]) -> None:
        for name, own in parameters.items():
            for key in keys[name]:
                own[key].copy_(source[key])

    def adapter(self) -> Tensors:
        return {key: one.detach().clone() for key, one in lora_of(self.whole["north"]).items()}


@pytest.mark.parametrize("between", ["rest", "train"])
@pytest.mark.parametrize(("optimizer", "lora", "tolerance"), [("sgd", "frozen-a", 1e-5), ("adamw", "plain", 1e-4)])
def test_mixed_cuts_train_what_uncut_models_train(
    optimizer: str, lora: str, tolerance: float, between: str, models: Models, tmp_path: Path
) -> None:
    """Three rounds of three steps: the adapters of hand-averaged uncut models, the same at every silo. Adam divides
    rounding errors by gradients that are as small."""
    train = {"steps": 3, "batch": 2, "optimizer": optimizer, "weight_decay": 0.0}
    recipe = mixed(smooth(models), tmp_path, between, lora, **train)
    run = RunDirectory.create(tmp_path / "run", recipe)
    trunk, ends = federate(recipe, run)
    start = dict(run.role("trunk").load_round(0)["adapter"])
    start |= adapters.initial_tensors(Checkpoint(recipe.model.path).config, recipe)

    def rests(name: str) -> bool:
        still = between == "rest" and is_disputed(name)
        frozen = lora == "frozen-a" and "lora_A" in name and any(keeps(silo, name) for silo in CUTS)
        return still or frozen

    oracle = HandAveraged(recipe, start, rests)
    for number in range(1, ROUNDS + 1):
        oracle.round(number)
    expected = oracle.adapter()
    for own in ends:
        torch.testing.assert_close(trunk | own, expected, rtol=0, atol=tolerance)
    moved = {name for name, one in expected.items() if not torch.equal(one, start[name])}
    assert moved == {name for name in expected if not rests(name)}
    number, kept = final_adapter(run)
    assert number == ROUNDS
    torch.testing.assert_close(kept, trunk | ends[0], rtol=0, atol=0)


@pytest.mark.parametrize("lora", ["frozen-a", "plain"])
def test_one_step_a_round_is_training_on_all_rows(lora: str, models: Models, tmp_path: Path) -> None:
    """Whoever keeps a block: plain SGD of one uncut model on the rows of all silos."""
    recipe = mixed(smooth(models), tmp_path, "train", lora, optimizer="sgd")
    run = RunDirectory.create(tmp_path / "run", recipe)
    trunk, ends = federate(recipe, run)
    start = dict(run.role("trunk").load_round(0)["adapter"])
    start |= adapters.initial_tensors(Checkpoint(recipe.model.path).config, recipe)
    frozen = {name for name in start if "lora_A" in name and any(keeps(silo, name) for silo in CUTS)}
    whole = train_uncut(recipe, start, [frozen if lora == "frozen-a" else set()] * ROUNDS)
    expected = {name: one.detach() for name, one in lora_of(whole).items()}
    for own in ends:
        assert_same(trunk | own, expected, 1e-5)
    assert_same(final_adapter(run)[1], trunk | ends[0], 0.0)


@pytest.mark.parametrize("lora", ["frozen-a", "plain"])
def test_mixed_cuts_go_on_where_they_were_stopped(lora: str, models: Models, tmp_path: Path) -> None:
    """All roles start anew before each round, once with a trunk that does not know the root's last one."""
    recipe = mixed(models("llama", blocks=BLOCKS), tmp_path, "train", lora, optimizer="adamw")
    alone = recipe.trunk.model_copy(update={"together": 1})  # what shares a pass changes last bits

    def rounds(count: int) -> Recipe:
        train = recipe.train.model_copy(update={"rounds": count, "steps": 2})
        return recipe.model_copy(update={"train": train, "trunk": alone})

    undisturbed = federate(rounds(3), RunDirectory.create(tmp_path / "undisturbed", recipe))
    run = RunDirectory.create(tmp_path / "stopped", recipe)
    federate(rounds(1), run)
    saved = run.role("trunk").load_round(1)
    changes = {name: one for group in saved["between"]["groups"] for name, one in group["change"].items()}
    before = run.role("trunk").load_round(0)["adapter"]
    trained = {name: before[name] + change for name, change in changes.items()}
    assert any(not torch.equal(one, saved["adapter"][name]) for name, one in trained.items())
    run.role("trunk").save_round(1, saved | {"adapter": saved["adapter"] | trained})  # as before the root's word
    federate(rounds(2), run)
    trunk, ends = federate(rounds(3), run)
    assert_same(trunk, undisturbed[0], 0.0)
    for own, expected in zip(ends, undisturbed[1], strict=True):
        assert_same(own, expected, 0.0)


def test_ranks_of_silos_own_beside_cuts_of_their_own(models: Models, tmp_path: Path) -> None:
    """Each silo trains its own rank behind its own cut, the root keeps ``lora.rank``; stopped rounds go on exactly."""
    recipe = mixed(models("llama", blocks=BLOCKS), tmp_path, lora="svd", optimizer="adamw")
    ranks = {"north": 2, "east": 4, "south": None, "west": 1}
    silos = tuple(one.model_copy(update={"rank": ranks[one.name]}) for one in recipe.silo)
    alone = recipe.trunk.model_copy(update={"together": 1})  # what shares a pass changes last bits
    recipe = recipe.model_copy(update={"silo": silos, "trunk": alone})

    def rounds(count: int) -> Recipe:
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"rounds": count, "steps": 2})})

    undisturbed = RunDirectory.create(tmp_path / "undisturbed", recipe)
    trunk, ends = federate(rounds(3), undisturbed)
    run = RunDirectory.create(tmp_path / "stopped", recipe)
    again = [federate(rounds(count), run) for count in (1, 2, 3)][-1]
    for own, other in zip([trunk, *ends], [again[0], *again[1]], strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)

    for silo, own in zip(recipe.silo, ends, strict=True):
        assert {one.shape[0] for name, one in own.items() if "lora_A" in name} == {silo.rank or recipe.lora.rank}
    start = dict(undisturbed.role("trunk").load_round(0)["adapter"])
    start |= adapters.initial_tensors(Checkpoint(recipe.model.path).config, recipe)
    learned = final_adapter(undisturbed)[1]
    assert learned.keys() == start.keys()
    for name, one in learned.items():
        assert one.shape == start[name].shape
        assert torch.equal(one, start[name]) == is_disputed(name), name


@pytest.fixture
def served(models: Models, tmp_path: Path) -> Iterator[tuple[Recipe, TrunkService]]:
    recipe = mixed(models("llama", blocks=BLOCKS), tmp_path)
    service = TrunkService(recipe, RoleDirectory(tmp_path / "trunk"))
    yield recipe, service
    service.stop()


def test_each_silo_generates_the_uncut_models_tokens(served: tuple[Recipe, TrunkService]) -> None:
    """All silos, greedily and with beams."""
    recipe, service = served
    silos = {name: join(recipe, name, channel=loopback(service, name, recipe)) for name in CUTS}
    part = service._runner.part
    ends = [own for silo in silos.values() for own in silo.parts]
    tensors = {key: one for own in (*ends, part) for key, one in adapters.adapter_of(own).items()}
    tensors |= random_b(tensors)
    for one in (part, *ends):
        adapters.load_adapter(one, tensors)
    whole = with_lora(uncut(Path(recipe.model.path)), recipe)
    load_lora(whole, tensors)
    for settings in ({}, {"num_beams": 3}):
        how = {**prompts(), "max_new_tokens": 12, "do_sample": False, **settings}
        expected = whole.generate(**how)
        for name, silo in silos.items():
            assert silo.model.bottom.config.num_hidden_layers == CUTS[name][0]
            assert torch.equal(silo.model.generate(**how), expected)
    for silo in silos.values():
        silo.close()
