"""A cut that moves in training: adapters and Adam's moments change sides, and each later step is the one that models in
one process take, whose tensors have changed hands."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import collate
from isthmus.engines.export import final_adapter
from isthmus.engines.repartition import move_if_due
from isthmus.federation.aggregator import root_service
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer
from isthmus.silo.worker import Worker
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, targets_of, uncut
from tests.oracle.conftest import Models
from tests.oracle.test_federation import RATE, WAIT, write_silos
from tests.oracle.twins import Tensors, load_lora, loopback, lora_of, with_lora

BLOCKS, ROUNDS, STEPS = 7, 6, 2
MOVES = [{"after": 2, "bottom": 3}, {"after": 4, "bottom": 2, "top": 2}]
"""From the cut (1, 1): blocks 1 and 2 to the silos; then block 2 back to the trunk, and block 5 to the silos."""
CUTS = {1: (1, 1), 3: (3, 1), 5: (2, 2)}
"""By the first round that has it."""


def recipe_of(
    model: Path, folder: Path, names: tuple[str, ...], moves: list[dict[str, int]], lora: str = "plain"
) -> Recipe:
    train = {"rounds": ROUNDS, "steps": STEPS, "batch": 2, "learning_rate": RATE, "weight_decay": 0.0}
    return make_recipe(
        model,
        federation={"lora": lora},
        silo=[one for one in write_silos(folder) if one["name"] in names],
        lora={"targets": targets_of("llama")},
        model={"bottom": 1, "top": 1, "moves": moves},
        task={"prompt": "{text}", "answer": " {reply}"},
        train=train | {"optimizer": "adamw", "evaluate": False},
        trunk={"together": 1},
    )


def phase(run: RunDirectory) -> None:
    """All roles of the run, until the silos end."""
    recipe = run.recipe()
    trunk = TrunkService(recipe, run.role("trunk"))
    trunk.restore(run.completed())
    root = root_service(recipe, run.role("root"))

    def silo(name: str) -> None:
        ways = {"trunk": loopback(trunk, name, recipe), "root": LoopbackChannel(root, name)}
        worker = Worker(recipe, name, run.role(name), **ways)
        worker.run()
        worker.close()

    with ThreadPoolExecutor(len(recipe.silo)) as threads:
        list(threads.map(silo, [one.name for one in recipe.silo], timeout=WAIT))
    trunk.stop()


def train(run: RunDirectory) -> list[tuple[int, tuple[int, int]]]:
    """Train to the end; returns after how many rounds the cut moved, and where to."""
    moved = []
    phase(run)
    while move_if_due(run):
        model = run.recipe().model
        moved.append((run.completed(), (model.bottom, model.top)))
        phase(run)
    return moved


def losses(run: RunDirectory, name: str) -> list[float]:
    lines = read_journal(run.role(name).path / "metrics.jsonl")
    return [line["loss"] for line in lines if line["event"] == "step"]


class OneProcess:
    """Uncut models, one a silo, and an optimizer for each tensor of each party that trains it."""

    def __init__(self, recipe: Recipe, start: Tensors) -> None:
        tokenizer = load_tokenizer(Path(recipe.model.path))
        self.whole = {silo.name: with_lora(uncut(Path(recipe.model.path)), recipe) for silo in recipe.silo}
        self.data = {silo.name: SiloData(silo, recipe, tokenizer) for silo in recipe.silo}
        self.own = {name: lora_of(one) for name, one in self.whole.items()}
        for one in self.whole.values():
            load_lora(one, start)
        self.own["trunk"] = {key: torch.nn.Parameter(one.clone()) for key, one in start.items()}
        self.optimizers: dict[tuple[str, str], torch.optim.Optimizer] = {}
        self.losses: dict[str, list[float]] = {name: [] for name in self.whole}
        self.frozen = recipe.federation.lora == "frozen-a"
        self.kept: set[str] = set()
        self.cut((1, 1), moments=True)

    def cut(self, ends: tuple[int, int], *, moments: bool) -> None:
        """Hand the tensors over: the trunk's moments to each silo, the mean of the silos' to the trunk. A frozen A
        stays as it comes, and the trunk begins anew with it."""
        kept = {key for key in self.own["trunk"] if self._is_kept(key, ends)}
        before, self.optimizers = self.optimizers, {}
        for party, named in self.own.items():
            for key, one in named.items():
                if (key in kept) != (party == "trunk") and not (party != "trunk" and self._rests(key)):
                    made = self.optimizers[party, key] = torch.optim.AdamW([one], lr=RATE, weight_decay=0.0)
                    states = [before[who, key].state_dict() for who in self.own if (who, key) in before]
                    if states and moments:
                        own = before[party, key].state_dict() if (party, key) in before else _mean(states)
                        made.load_state_dict(copy.deepcopy(own))
        self.kept = kept

    def round(self, number: int) -> None:
        begun = {key: one.detach().clone() for key, one in next(iter(self.own.values())).items()}
        weights = dict.fromkeys(self.whole, 0.0)
        batches = {name: data.round_batches(number) for name, data in self.data.items()}
        for step in range(STEPS):
            grads = {key: torch.zeros_like(one) for key, one in begun.items()}
            taken = {name: collate(batches[name][step], self.data[name].pad) for name in self.whole}
            for name, batch in taken.items():
                self.whole[name].zero_grad()
                loss = self.whole[name](**batch.inputs()).loss
                loss.backward()
                self.losses[name].append(float(loss.detach()))
                weights[name] += batch.weight
                for key, one in self.own[name].items():
                    grads[key] += batch.weight / sum(one.weight for one in taken.values()) * one.grad
                    if key in self.kept and not self._rests(key):
                        self.optimizers[name, key].step()
            for key, one in self.own["trunk"].items():
                if key not in self.kept:
                    one.grad = grads[key]
                    self.optimizers["trunk", key].step()
                    self._spread({key: one})
        after = {}
        for key in self.kept:
            changes = [weight * (self.own[name][key] - begun[key]) for name, weight in weights.items()]
            after[key] = begun[key] + sum(changes, torch.zeros_like(begun[key])) / sum(weights.values())
        self._spread(after)

    @torch.no_grad()
    def _spread(self, tensors: Any) -> None:
        for named in self.own.values():
            for key, one in tensors.items():
                named[key].copy_(one)

    def _rests(self, name: str) -> bool:
        """Whether silos do not train this tensor."""
        return self.frozen and "lora_A" in name

    @staticmethod
    def _is_kept(name: str, ends: tuple[int, int]) -> bool:
        block = int(name.split("layers.")[1].split(".")[0])
        return block < ends[0] or block >= BLOCKS - ends[1]


def _mean(states: list[dict[str, Any]]) -> dict[str, Any]:
    found = copy.deepcopy(states[0])
    for key, one in found["state"][0].items():
        values = [state["state"][0][key] for state in states]
        found["state"][0][key] = one if key == "step" else torch.stack(values).mean(dim=0)
    return found


@pytest.fixture
def model(models: Models) -> Path:
    return models("llama", vivid=False, blocks=BLOCKS, initializer_range=0.1)


def oracle_of(recipe: Recipe, run: RunDirectory, *, moments: bool = True) -> OneProcess:
    start = dict(run.role("trunk").load_round(0)["adapter"])
    start |= adapters.initial_tensors(Checkpoint(recipe.model.path).config, run.recipe())
    found = OneProcess(recipe, start)
    for number in range(1, ROUNDS + 1):
        if number in CUTS and number > 1:
            found.cut(CUTS[number], moments=moments)
        found.round(number)
    return found


@pytest.mark.parametrize("lora", ["plain", "frozen-a"])
def test_training_goes_on_across_moves(model: Path, tmp_path: Path, lora: str) -> None:
    """The loss of every step, of all silos, and all tensors in the end; without the moments they are others."""
    recipe = recipe_of(model, tmp_path, ("north", "east", "south"), MOVES, lora)
    run = RunDirectory.create(tmp_path / "run", recipe)
    assert train(run) == [(2, (3, 1)), (4, (2, 2))]
    oracle, forgetful = oracle_of(recipe, run), oracle_of(recipe, run, moments=False)
    for name in oracle.whole:
        expected = torch.tensor(oracle.losses[name])
        got = torch.tensor(losses(run, name))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(got, torch.tensor(forgetful.losses[name]), rtol=0, atol=1e-5)
    number, kept = final_adapter(run)
    assert number == ROUNDS
    expected_tensors = {key: one.detach() for key, one in oracle.own["trunk"].items()}
    torch.testing.assert_close(kept, expected_tensors, rtol=0, atol=1e-4)


def test_a_silo_alone_notices_no_move(model: Path, tmp_path: Path) -> None:
    """With one silo each tensor has one owner at a time: the loss is that of a run whose cut stays."""
    found = []
    for place, moves in (("moved", MOVES), ("stayed", [])):
        run = RunDirectory.create(tmp_path / place, recipe_of(model, tmp_path, ("north",), moves))
        assert len(train(run)) == len(moves)
        found.append(torch.tensor(losses(run, "north")))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    assert float(found[0][0] - found[0][-1]) > 1e-3
