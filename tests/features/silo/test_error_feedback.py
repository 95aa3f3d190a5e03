"""What compression leaves out is a part of a silo's state: a run that stopped or lost a round ends as another does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from google.protobuf.message import Message
from transformers import PreTrainedTokenizerFast

from isthmus.errors import RoundLostError
from isthmus.federation.aggregator import root_service
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting
from isthmus.silo.worker import Worker
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model, write_rows

ROUNDS = 4
Tensors = dict[str, torch.Tensor]


class Losing(LoopbackChannel):
    """A way to the root on which the update of one round is lost."""

    loses = 0

    def submit(self, request: Message) -> Answer:
        if isinstance(request, pb.Update) and request.round == self.loses:
            self.loses = 0
            raise RoundLostError("gone on its way", remedy="ask for the next plan")
        return super().submit(request)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture
def recipe(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr("isthmus.silo.join.load_tokenizer", PreTrainedTokenizerFast.from_pretrained)
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"text": f"w{20 + n} w{30 + n}", "reply": f"w{60 + n}"} for n in range(8)]
    )
    return make_recipe(
        model,
        task={"prompt": "{text}", "answer": " {reply}"},
        silo=[{"name": "a", "train": str(rows)}],
        train={"rounds": ROUNDS, "steps": 2, "batch": 4, "learning_rate": 0.01, "evaluate": False},
        federation={"compression": {"kind": "random-k", "keep": 0.2}},
    )


def play(recipe: Recipe, run: RunDirectory, loses: int = 0) -> Tensors:
    """All roles, from the last round on disk to the recipe's last; the shared tensors after it."""
    trunk, root = TrunkService(recipe, run.role("trunk")), root_service(recipe, run.role("root"))
    way = Losing(root, "a")
    way.loses = loses
    hello = greeting(Checkpoint(recipe.model.path), recipe)
    worker = Worker(recipe, "a", run.role("a"), trunk=LoopbackChannel(trunk, "a", greeting=hello), root=way)
    worker.run()
    worker.close()
    trunk.stop()
    shared: Tensors = run.role("root").load_round(recipe.train.rounds)["shared"]
    return shared


def rest(run: RunDirectory, round: int) -> torch.Tensor:
    (found,) = run.role("a").load_round(round)["updates"].values()
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("fault", ["stopped", "lost"])
def test_a_run_that_stopped_or_lost_a_round_ends_as_another(recipe: Recipe, tmp_path: Path, fault: str) -> None:
    whole = RunDirectory.create(tmp_path / "whole", recipe)
    expected = play(recipe, whole)
    other = RunDirectory.create(tmp_path / "other", recipe)
    if fault == "stopped":
        play(recipe.model_copy(update={"train": recipe.train.model_copy(update={"rounds": 2})}), other)
    found = play(recipe, other, loses=3 if fault == "lost" else 0)
    assert rest(whole, ROUNDS).count_nonzero() > 0
    assert torch.equal(rest(other, ROUNDS), rest(whole, ROUNDS))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
