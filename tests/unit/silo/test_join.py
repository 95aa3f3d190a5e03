"""Joining: ends of the trunk's round, a greeting that names the model, and what is missing, by its kind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.errors import BudgetExhausted, IdentityError, ModelError, RecipeError, RunError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.ledger import MemoryLedger
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, greeting, join, load_data, load_ends, load_tokenizer
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, answered
from tests.conftest import make_recipe, save_tiny_model, write_rows
from tests.oracle.twins import loopback


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def silo(folder: Path, tmp_path: Path) -> Iterator[Silo]:
    recipe = make_recipe(folder)
    service = TrunkService(recipe, RoleDirectory(tmp_path / "trunk"))
    joined = join(recipe, "a", channel=loopback(service, "a", recipe))
    yield joined
    joined.close()
    service.stop()


def test_a_silo_holds_its_ends_and_notes_in_memory(silo: Silo) -> None:
    assert [part.name for part in silo.parts] == ["bottom", "top"]
    assert isinstance(silo.boundary.ledger, MemoryLedger)
    assert silo.guard is None
    with torch.no_grad():
        assert silo.model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 97)
    assert len(silo.boundary.ledger.releases) == 1


def test_a_recipe_may_be_named_by_its_file(folder: Path, tmp_path: Path) -> None:
    recipe, file = make_recipe(folder).anchored(tmp_path), tmp_path / "recipe.toml"
    file.write_text(recipe.toml(), encoding="utf-8")
    service = TrunkService(recipe, RoleDirectory(tmp_path / "trunk"))
    for named in (file, str(file)):
        with join(named, "a", channel=loopback(service, "a", recipe)) as silo:
            assert silo.name == "a"
    service.stop()


def test_its_rows_are_known_to_its_register(silo: Silo, folder: Path, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "w5 w6", "answer": "w7"}]))
    recipe = make_recipe(folder, silo=[{"name": "a", "train": rows}])
    assert [row.prompt for row in load_data(recipe, "a", silo).train] == [[5, 6]]


def test_ends_start_alike_everywhere(folder: Path) -> None:
    recipe = make_recipe(folder)
    one, other = (load_ends(Checkpoint(str(folder)), recipe) for _ in range(2))
    for part, twin in zip(one, other, strict=True):
        tensors = adapters.adapter_of(twin)
        assert tensors
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapters.adapter_of(part).items())


def test_a_greeting_names_model_cut_and_process(folder: Path) -> None:
    recipe, checkpoint = make_recipe(folder), Checkpoint(str(folder))
    first, second = greeting(checkpoint, recipe), greeting(checkpoint, recipe)
    assert (first.fingerprint, first.bottom, first.top) == (checkpoint.fingerprint, 1, 1)
    assert first.instance != second.instance


def test_a_tokenizer_pads_on_the_left(folder: Path) -> None:
    tokenizer: Any = load_tokenizer(folder)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<pad>")


def test_what_is_missing_is_named_by_its_kind(folder: Path, tmp_path: Path) -> None:
    def joined(recipe: Recipe, name: str = "a") -> Silo:
        return join(recipe, name)

    with pytest.raises(RecipeError, match="no silo 'west'"):
        joined(make_recipe(folder), "west")
    with pytest.raises(ModelError):
        joined(make_recipe(tmp_path / "nowhere"))
    with pytest.raises(IdentityError):
        joined(make_recipe(folder, wire={"certificates": str(tmp_path / "none")}))
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(ModelError, match="no usable tokenizer"):
        joined(make_recipe(bare))


@pytest.fixture
def learned(folder: Path, tmp_path: Path) -> Iterator[TrunkService]:
    """A trunk that has learned two rounds."""
    directory = RoleDirectory(tmp_path / "trunk")
    recipe = make_recipe(folder)
    TrunkService(recipe, directory).stop()
    directory.save_round(2, directory.load_round(0))
    service = TrunkService(recipe, directory)
    yield service
    service.stop()


class Root:
    """Has the shared adapters after a round."""

    def __init__(self, completed: int, tensors: dict[str, torch.Tensor], run: str = "") -> None:
        self.answer = pb.Adapters(completed=completed, adapters=codec.encode_named(tensors), run=run)

    def handle(self, peer: str, request: Message) -> Answer:
        return answered(self.answer if isinstance(request, pb.Current) else pb.Pong())


def shared_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    shapes = adapters.shared_shapes(load_ends(Checkpoint(recipe.model.path), recipe))
    return {name: torch.full(shape, 0.5) for name, shape in shapes.items()}


def test_fresh_ends_beside_a_trunk_that_learned_are_refused(
    folder: Path, learned: TrunkService, tmp_path: Path
) -> None:
    wire = {"certificates": str(tmp_path / "none"), "deadline": 0.2}
    recipe = make_recipe(folder, wire=wire)
    with pytest.raises(
        RunError, match="the trunk has learned 2 rounds, but a has no adapters of that round"
    ) as refused:
        join(recipe, "a", channel=loopback(learned, "a", recipe))
    assert "isthmus.open" in refused.value.remedy
    assert "fresh=True" in refused.value.remedy
    join(recipe, "a", channel=loopback(learned, "a", recipe), fresh=True).close()


def test_current_adapters_come_from_the_root(
    folder: Path, learned: TrunkService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = make_recipe(folder), learned._run
    shared = shared_of(recipe)

    def joined(root: Root, **options: Any) -> Silo:
        monkeypatch.setattr("isthmus.silo.join.connect", lambda *_, **__: LoopbackChannel(root, "a"))
        return join(recipe, "a", channel=loopback(learned, "a", recipe), **options)

    with joined(Root(2, shared, run), run_dir=tmp_path / "run") as silo:
        found = {name: one for part in silo.parts for name, one in adapters.trainable(part).items()}
        assert found.keys() == shared.keys()
        assert all(torch.equal(one, shared[name]) for name, one in found.items())
    assert RunDirectory.open(tmp_path / "run").role("a").shared.rounds() == {2}
    for root, told in (
        (Root(3, shared, run), "serves round 2, the silo has the adapters of round 3"),
        (Root(2, shared, "other"), "another run"),
        (Root(2, {"x": torch.zeros(1)}), "no adapters of that round"),
    ):
        with pytest.raises(RunError, match=told):
            joined(root)


def test_nobody_joins_in_the_midst_of_a_round(folder: Path, learned: TrunkService) -> None:
    recipe = make_recipe(folder)
    with join(recipe, "a", channel=loopback(learned, "a", recipe), fresh=True) as silo:
        silo.rounds.begin(3, ["a"])
        silo.model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
        silo.rounds.commit(3, 1, 1.0)
        with pytest.raises(RunError, match="the trunk trains"):
            join(recipe, "a", channel=loopback(learned, "a", recipe))


def test_budgets_need_a_ledger_that_remembers(folder: Path, tmp_path: Path) -> None:
    clipped = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 1.0, "delta": 1e-5, "unit": "sequence"}
    section = {"boundary": {"forward": clipped, "gradient": clipped}, "privacy": {"record_epsilon": 1.2}}
    recipe = make_recipe(folder, **section)
    service = TrunkService(recipe, RoleDirectory(tmp_path / "trunk"))
    with pytest.raises(RecipeError, match="nobody remembers what was spent") as refused:
        join(recipe, "a", channel=loopback(service, "a", recipe))
    assert "run_dir" in refused.value.remedy
    ids = torch.tensor([[5, 6]])
    with torch.no_grad():
        with join(recipe, "a", channel=loopback(service, "a", recipe), run_dir=tmp_path / "run") as silo:
            silo.model(input_ids=ids)
        with (
            join(recipe, "a", channel=loopback(service, "a", recipe), run_dir=tmp_path / "run") as silo,
            pytest.raises(BudgetExhausted),
        ):
            silo.model(input_ids=ids)
    service.stop()
