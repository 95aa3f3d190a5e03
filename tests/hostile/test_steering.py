"""A root that steers what crosses by the adapters that it gives, or a trunk by the gradients that it returns: silos
refuse what no honest rounds could have made, and a bottom that is frozen is moved by neither.

Root, trunk and worker are the real ones; what the root answers is changed on its way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.attacks.steering import steer
from isthmus.errors import FrameError, IsthmusError, ProtocolError
from isthmus.federation.aggregator import root_service
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting, join
from isthmus.silo.worker import Worker
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, Service, answered
from tests.conftest import make_recipe, save_tiny_model, write_rows
from tests.unit.attacks.steered import WIDE, accuracies, knowledge_of, scenario

ROUNDS = 3
Lie = Callable[[Any], None]


class LyingRoot:
    """An honest root whose plans and adapters are changed on their way out."""

    def __init__(self, root: Service, lie: Lie) -> None:
        self._root, self._lie = root, lie

    def handle(self, peer: str, request: Message) -> Answer:
        found = self._root.handle(peer, request).result()
        if isinstance(found, (pb.Plan, pb.Adapters)):
            own = type(found)()
            own.CopyFrom(found)
            self._lie(own)
            found = own
        return answered(found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


def recipe_of(model: Path, place: Path, **sections: Any) -> Recipe:
    rows = write_rows(
        place / "rows.jsonl", [{"prompt": f"w{20 + n} w{30 + n}", "answer": f"w{60 + n}"} for n in range(8)]
    )
    train = {"rounds": ROUNDS, "steps": 1, "batch": 4, "learning_rate": 0.01, "evaluate": False}
    return make_recipe(model, silo=[{"name": "a", "train": str(rows)}], train=train, **sections)


class Counting(LoopbackChannel):
    """A way to the trunk that counts what of the text leaves."""

    crossed = 0

    def submit(self, request: Message) -> Answer:
        self.crossed += isinstance(request, pb.Forward)
        return super().submit(request)


@contextmanager
def parties(recipe: Recipe, run: RunDirectory, lie: Lie) -> Iterator[tuple[Worker, Counting]]:
    """A silo's worker beside an honest trunk and a lying root, and the silo's way to the trunk."""
    trunk = TrunkService(recipe, run.role("trunk"))
    way = Counting(trunk, "a", greeting=greeting(Checkpoint(recipe.model.path), recipe))
    root = LyingRoot(root_service(recipe, run.role("root")), lie)
    worker = Worker(recipe, "a", run.role("a"), trunk=way, root=LoopbackChannel(root, "a"))
    try:
        yield worker, way
    finally:
        worker.close()
        trunk.stop()


def changed(adapters: Any, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change the tensors of a plan in place."""
    for one in adapters:
        tensor = torch.frombuffer(bytearray(one.data), dtype=torch.float32).view(*one.shape)
        one.data = change(one.name, tensor).numpy().tobytes()


def far(answer: Any) -> None:
    """Adapters that no honest round could have made, from round 1 on."""
    if answer.completed:
        changed(answer.adapters, lambda _, tensor: tensor + 0.5)


def at_once(answer: Any) -> None:
    """The same before any round."""
    changed(answer.adapters, lambda _, tensor: tensor + 0.5)


def ahead(answer: Any) -> None:
    """The same with as many rounds as would allow for it."""
    changed(answer.adapters, lambda _, tensor: tensor + 0.5)
    answer.completed += 1000


def not_finite(answer: Any) -> None:
    changed(answer.adapters, lambda _, tensor: tensor * float("nan"))


def larger(answer: Any) -> None:
    answer.adapters[0].shape[0] += 1


def unknown(answer: Any) -> None:
    """An adapter of a part that the silo does not train."""
    answer.adapters.append(codec.encode_named({"model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32, 8)})[0])


def honest(answer: Any) -> None:
    pass


BOUNDED: dict[str, Any] = {"federation": {"max_change": 0.3}}
CLIPPED: dict[str, Any] = {"boundary": {"update": {"clip": 0.3, "noise": 0.0}}}


@pytest.mark.parametrize(
    ("lie", "sections", "told", "forwards"),
    [
        (far, BOUNDED, "away from those of round 0; this silo accepts 0.3: 0.3 a round .federation.max_change", 1),
        (far, CLIPPED, "this silo accepts 0.3: 0.3 a round .which the recipe implies", 1),
        (at_once, BOUNDED, "round 0 are .* away from those of round 0; this silo accepts 0:", 0),
        (ahead, BOUNDED, "adapters of round 1000 of 3", 0),
        (not_finite, {}, "holds NaN or infinity", 0),
        (larger, {}, "has shape", 0),
        (unknown, {"lora": {"freeze_bottom": True}}, "unexpected tensor 'model.layers.0", 0),
    ],
)
def test_refused_by_name_and_nothing_crosses_under_them(
    model: Path, tmp_path: Path, lie: Lie, sections: dict[str, Any], told: str, forwards: int
) -> None:
    recipe = recipe_of(model, tmp_path, **sections)
    run = RunDirectory.create(tmp_path / "run", recipe)
    with (
        parties(recipe, run, lie) as (worker, way),
        pytest.raises((ProtocolError, FrameError), match=told) as refused,
    ):
        worker.run()
    assert refused.value.remedy
    assert way.crossed == forwards  # those of honest rounds before
    with parties(recipe, run, honest) as (worker, way):  # normal service afterwards
        worker.run()
        assert way.crossed == ROUNDS - forwards
    assert run.role("root").last_round() == ROUNDS


@pytest.mark.parametrize("sections", [BOUNDED, CLIPPED])
def test_honest_rounds_are_accepted(model: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    recipe = recipe_of(model, tmp_path, **sections)
    with parties(recipe, RunDirectory.create(tmp_path / "run", recipe), honest) as (worker, way):
        worker.run()
        assert way.crossed == ROUNDS


def test_a_silo_that_joins_later_refuses_them_too(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = recipe_of(model, tmp_path, **BOUNDED)
    run = RunDirectory.create(tmp_path / "run", recipe)
    with parties(recipe, run, honest) as (worker, _):
        worker.run()
    trunk, root = TrunkService(recipe, run.role("trunk")), root_service(recipe, run.role("root"))
    trunk.restore(ROUNDS)
    hello = greeting(Checkpoint(recipe.model.path), recipe)
    lies = [far]
    monkeypatch.setattr(
        "isthmus.silo.join.connect", lambda *_, **__: LoopbackChannel(LyingRoot(root, lies[0]), "a")
    )  # join reaches the root by itself
    way = Counting(trunk, "a", greeting=hello)
    try:
        with pytest.raises(IsthmusError, match=r"this silo accepts 0\.9: 0\.3 a round"):
            join(recipe, "a", channel=way)
        assert not way.crossed
        lies[0] = honest
        join(recipe, "a", channel=LoopbackChannel(trunk, "a", greeting=hello)).close()
    finally:
        trunk.stop()


def test_adapters_that_were_refused_are_not_kept(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, tmp_path, **BOUNDED)
    run = RunDirectory.create(tmp_path / "run", recipe)
    with parties(recipe, run, far) as (worker, _), pytest.raises(ProtocolError):
        worker.run()
    assert RoleDirectory(run.role("a").path).shared.rounds() == set()


DEFENDED = {"bounded": {"federation": {"max_change": 0.05}}, "frozen": {"lora": {"freeze_bottom": True}}}


@pytest.fixture(scope="module")
def undefended(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    made = scenario(model, tmp_path_factory.mktemp("undefended"), "steering")
    return accuracies(made, steer(knowledge_of(made, "root+trunk")))


def test_without_a_defence_one_vector_tells_an_attribute(undefended: dict[str, float]) -> None:
    assert undefended["steered"] >= 0.85
    assert undefended["unsteered"] <= 0.7


@pytest.mark.parametrize("defence", list(DEFENDED))
def test_with_one_it_tells_what_it_told_before(
    model: Path, tmp_path: Path, undefended: dict[str, float], defence: str
) -> None:
    made = scenario(model, tmp_path, "steering", **DEFENDED[defence])
    guesses = steer(knowledge_of(made, "root+trunk"))
    found = accuracies(made, guesses)
    assert found["unsteered"] == undefended["unsteered"]
    assert found["steered"] <= found["unsteered"] + 0.1
    if defence == "frozen":
        assert guesses.by["steered"] == guesses.by["unsteered"]


@pytest.mark.parametrize("defence", [None, "lora.freeze_bottom", "boundary.gradients"])
def test_a_trunks_own_gradients_move_no_bottom_that_is_frozen_or_gets_none(
    model: Path, tmp_path: Path, defence: str | None
) -> None:
    """However large they are. Without a defence they move what crosses."""
    sections: dict[str, Any] = {"lora": {"freeze_bottom": defence == "lora.freeze_bottom"}}
    gradients = {"gradients": defence != "boundary.gradients"}
    made = scenario(model, tmp_path, "hijacking", rows=8, own=8, silos=2, boundary={**WIDE, **gradients}, **sections)
    view, lessons = made.view("trunk+silo"), list[int]()
    assert view.hijacking is not None

    def lesson(sequences: Sequence[torch.Tensor], _: Any) -> list[torch.Tensor]:
        lessons.append(len(sequences))
        return [torch.full_like(one, 1e3) for one in sequences]

    crossings, _ = view.hijacking(lesson)
    moved = [not torch.equal(one.hidden_LD, two.hidden_LD) for one, two in zip(crossings, view.crossings, strict=True)]
    assert any(lessons) == all(moved) == any(moved) == (defence is None)
