"""A silo that would train the trunk of a federation for inference only: every other silo's answers would change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import at_address
from isthmus.engines.roles import start_server
from isthmus.errors import ProtocolError
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, join
from isthmus.storage.record import RunDirectory
from isthmus.wire import isthmus_pb2 as pb
from tests.integration.processes import write_federation

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def silo(tmp_path: Path) -> Iterator[Silo]:
    """A silo without rows, at a trunk that takes no training step."""
    silos = [{"name": "north"}, {"name": "south"}]
    recipe = Recipe.read(write_federation(tmp_path, train={"rounds": 0, "evaluate": False}, silo=silos))
    run = RunDirectory.create(tmp_path / "run", recipe)
    recipe = run.recipe()
    make_certificates(recipe, Path(recipe.wire.certificates))
    server, services = start_server(at_address(recipe, "localhost:0"), run, ("trunk",))
    with join(at_address(recipe, f"localhost:{server.port}"), "north", run_dir=tmp_path / "north") as joined:
        yield joined
    server.stop()
    services["Trunk"].stop()  # type: ignore[attr-defined]


def logits(silo: Silo) -> torch.Tensor:
    with torch.no_grad():
        return silo.model(input_ids=IDS).logits


ONES = pb.Matrix(codec="fp32", rows=1, width=32, data=bytes(128))
MESSAGES = {
    "begin": pb.Begin(round=1, participants=["north"]),
    "begin openly": pb.Begin(open=True, participants=["north"]),
    "forward": pb.Forward(step=1, lengths=[1], hidden=ONES, train=True),
    "commit": pb.Commit(round=1, step=1, weight=1.0),
    "backward": pb.Backward(step=1, gradient=ONES),
    "keep": pb.Keep(example=7, hidden=ONES),
    "end": pb.End(round=1),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_message_of_training_is_refused_and_inference_goes_on(kind: str, silo: Silo) -> None:
    before = logits(silo)
    with pytest.raises(ProtocolError, match="train"):
        silo.trunk.channel.call(MESSAGES[kind])
    assert torch.equal(logits(silo), before)
    assert silo.model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2).shape[1] > 4


def test_a_training_loop_of_ones_own_is_refused(silo: Silo) -> None:
    before = logits(silo)
    silo.model.train()
    with pytest.raises(ProtocolError, match="nothing does"):
        silo.model(input_ids=IDS, labels=IDS).loss.backward()
    silo.model.eval()
    assert torch.equal(logits(silo), before)
