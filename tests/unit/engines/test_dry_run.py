"""A dry run measures steps, and nothing else happens: on the wire, at the trunk, in the silo's folders."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.engines.dry_run import DRY_STEPS, TRAINS, DryChannel, DryRun, dry_run, random_batch, without_budgets
from isthmus.engines.zero_trunk import ZeroTrunk
from isthmus.errors import ProtocolError
from isthmus.joining.join import join_federation
from isthmus.model import adapters
from isthmus.recipe import Recipe
from isthmus.silo.join import connect_silo
from isthmus.silo.trainer import train_step
from isthmus.trunk.service import TrunkService
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model
from tests.unit.joining.test_join import Coordinator, rows

LENGTH = 16


class Tapped:
    """A coordinator, a silo that has joined, and what the trunk is asked."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[Message] = []
        self.services: list[TrunkService] = []
        handle = TrunkService.handle

        def tapped(service: TrunkService, peer: str, request: Message) -> Any:
            self.services.append(service)
            self.asked.append(request)
            return handle(service, peer, request)

        patch.setattr(TrunkService, "handle", tapped)
        self.leader = Coordinator(folder / "leader")
        self.folder = folder
        self.serving = self.leader.serving()
        self.serving.__enter__()
        joined = join_federation(self.leader.authority.invite("north"), folder / "north", rows(folder / "data"))
        self.recipe = Recipe.read(joined.recipe)

    def close(self) -> None:
        self.serving.__exit__(None, None, None)

    def state(self) -> dict[str, str]:
        """Digests of all files of all parties, and of the trunk's adapter."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        found = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        for service in self.services[:1]:
            for name, one in adapters.adapter_of(service._runner.part).items():
                found[name] = hashlib.sha256(one.detach().numpy().tobytes()).hexdigest()
            found["rounds"] = f"{service._training.completed} {service._training.moved} {service._instances}"
            found["kept"] = str(sorted(service._compared))
        return found


@pytest.fixture
def tapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tapped]:
    with closing(Tapped(tmp_path, monkeypatch)) as made:
        yield made


def last(recipe: Recipe, alone: str = "") -> DryRun:
    *_, found = dry_run(recipe, "north", LENGTH, alone)
    return found


def test_nothing_crosses_but_forwards_of_random_tokens_and_nothing_changes(tapped: Tapped) -> None:
    last(tapped.recipe)  # the trunk knows this silo
    shutil.rmtree(tapped.folder / "data")  # the silo's rows are not needed
    tapped.asked.clear()
    before = tapped.state()
    found = last(tapped.recipe)
    assert tapped.state() == before
    assert {type(one) for one in tapped.asked} == {pb.Ping, pb.Forward}
    forwards = [one for one in tapped.asked if isinstance(one, pb.Forward)]
    assert len(forwards) == found.steps == DRY_STEPS
    for one in forwards:
        assert (one.train, one.dropout, list(one.examples)) == (False, False, [])
        assert list(one.lengths) == [LENGTH] * tapped.recipe.train.batch
    assert not found.alone
    assert found.waited is not None
    assert 0 < found.waited <= found.seconds <= found.step_seconds
    assert found.memory > 0
    assert found.frame > 0


def test_a_silo_that_runs_meanwhile_is_not_disturbed(tapped: Tapped) -> None:
    with connect_silo(tapped.recipe, "north") as silo:
        ids = torch.tensor([[5, 6, 7]])
        before = silo.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        session = silo.trunk.open_session()
        known = dict(tapped.services[0]._instances)
        last(tapped.recipe)
        assert tapped.services[0]._instances == known
        assert torch.equal(silo.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), before)
        session.close()


def test_a_federation_that_trains_is_left_alone(tapped: Tapped) -> None:
    with connect_silo(tapped.recipe, "north") as silo:
        optimizer = torch.optim.SGD([one for one in silo.model.parameters() if one.requires_grad], lr=0.1)
        batch = random_batch(tapped.recipe, silo, LENGTH)
        silo.rounds.participants = []
        train_step(silo.model, optimizer, batch)
        assert tapped.services[0]._training.moved
        tapped.asked.clear()
        found = last(tapped.recipe)
        assert (found.alone, found.waited, found.steps) == (TRAINS, None, DRY_STEPS)
        assert {type(one) for one in tapped.asked} == {pb.Ping}
        train_step(silo.model, optimizer, batch)  # its round goes on


def test_alone_the_trunk_is_not_asked(tapped: Tapped) -> None:
    tapped.asked.clear()
    found = last(tapped.recipe, "not reached")
    assert (found.alone, found.waited) == ("not reached", None)
    assert not tapped.asked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


KINDS: dict[str, dict[str, Any]] = {
    "micro-batches": {"train": {"micro_batches": 2, "batch": 4}},
    "release once": {"boundary": {"release_once": True}, "lora": {"freeze_bottom": True}},
    "no gradients": {"boundary": {"gradients": False}},
    "inference only": {"train": {"rounds": 0}},
    "budgets": {
        "privacy": {"record_epsilon": 1.0},
        "boundary": {"forward": {"noise": 1.0, "clip": 1.0}, "gradient": {"noise": 1.0, "clip": 1.0}},
    },
    "masks": {"silos": ("north", "b", "c"), "federation": {"secure": {"masks": True}}},
    "sharp": {"train": {"sharpness": 0.05}},
    "wide rows": {"train": {"max_tokens": 100_000}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_silos_of_every_kind_can_be_tried(kind: str, model: Path) -> None:
    recipe = make_recipe(model, **{"silos": ("north",), **KINDS[kind]})
    recipe = recipe.model_copy(update={"threads": 1})
    found = last(recipe, "nobody is there")
    assert found.steps == DRY_STEPS
    assert found.up > 0
    assert found.frame > found.up / 4


def test_the_channel_lets_nothing_through_that_could_change_a_trunk(model: Path) -> None:
    recipe = make_recipe(model)
    inner = Recording(LoopbackChannel(ZeroTrunk(recipe), "a"))
    channel = DryChannel(LoopbackChannel(ZeroTrunk(recipe), "a"), inner)  # type: ignore[arg-type]
    hidden = pb.Matrix(codec="fp32", rows=2, width=32, data=bytes(256))
    channel.call(pb.Forward(step=1, lengths=[2], hidden=hidden, train=True, dropout=True))
    channel.call(pb.Backward(step=1, reply=True, gradient=hidden))
    assert inner.asked == [pb.Forward(step=1, lengths=[2], hidden=hidden)]
    for refused in (pb.Begin(round=1, participants=["a"]), pb.Commit(round=1, step=1, weight=1.0), pb.End(round=1)):
        with pytest.raises(ProtocolError):
            channel.call(refused)
    with pytest.raises(ProtocolError, match="keeps no examples"):
        channel.call(pb.Forward(step=2, lengths=[2], examples=[3]))
    assert len(inner.asked) == 1
    assert channel.sent_bytes > 2 * 256
    assert channel.received_bytes > 2 * 256


class Recording:
    """A channel that notes what it is asked."""

    def __init__(self, channel: LoopbackChannel) -> None:
        self.asked: list[Message] = []
        self._channel = channel

    def submit(self, request: Message) -> Any:
        self.asked.append(request)
        return self._channel.submit(request)


def test_budgets_are_taken_out_and_nothing_else(model: Path) -> None:
    recipe = make_recipe(model, **KINDS["budgets"])
    free = without_budgets(recipe)
    assert free.privacy.record_epsilon is None
    assert free.boundary == recipe.boundary
    assert without_budgets(make_recipe(model, train={"rounds": 0})).train.rounds == 1
