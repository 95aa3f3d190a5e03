"""An opened run is the uncut model with the exported adapter, to the last bit; else it is said why not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from isthmus.engines import opening
from isthmus.engines.export import export_adapter
from isthmus.engines.local import at_address, create_run
from isthmus.engines.opening import open_run
from isthmus.engines.roles import start_server
from isthmus.errors import (
    IdentityError,
    LedgerTakenError,
    MismatchError,
    ModelError,
    PeerGoneError,
    RecipeError,
    RunError,
)
from isthmus.model import adapters
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo
from isthmus.storage.record import RunDirectory
from tests.conftest import save_tiny_model, uncut
from tests.integration.processes import free_port, served_here, silos_here, train_here, write_federation
from tests.oracle.twins import prompts, ragged

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
SHORT = {"rounds": 1, "steps": 2, "evaluate": False, "learning_rate": 0.1}
Moved = Callable[..., Path]


def trained(folder: Path, **sections: Any) -> RunDirectory:
    """A run of the local engine's, all of whose roles were in this process."""
    run = create_run(Recipe.read(write_federation(folder, **{"train": SHORT, **sections})), folder / "run")
    train_here(run)
    return run


@pytest.fixture(autouse=True)
def trunk_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trunk that opening a local run starts is a thread of this process."""
    monkeypatch.setattr(opening, "serving", serving)


@contextmanager
def serving(run: RunDirectory, number: int | None = None) -> Iterator[tuple[None, str]]:
    server, services = start_server(at_address(run.recipe(), "localhost:0"), run, ("trunk",), number)
    yield None, f"localhost:{server.port}"
    server.stop()
    services["Trunk"].stop()  # type: ignore[attr-defined]


@pytest.fixture
def moved(run: RunDirectory, tmp_path: Path) -> Moved:
    """A folder with what a deployed silo's own has; the recipe's trunk is nowhere."""

    def move(name: str = "north", **changes: Any) -> Path:
        recipe = at_address(run.recipe(), f"localhost:{free_port()}")
        wire = recipe.wire.model_copy(update={"deadline": 0.5})
        folder = tmp_path / f"{name}-alone"
        shutil.copytree(run.role(name).path, folder / "silos" / name)
        RunDirectory(folder).record(recipe.model_copy(update={"wire": wire, **changes}))
        return folder

    return move


def assert_exact(silo: Silo, run: RunDirectory, out: Path) -> None:
    """Logits of a batch, and greedy tokens of a ragged one, are the uncut model's with the exported adapter."""
    export_adapter(run, out)
    base = uncut(Path(run.recipe().model.path))
    rows = {key: value for key, value in ragged("left", lengths=(24, 24, 24)).items() if key != "labels"}
    greedy: dict[str, Any] = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12}
    with torch.no_grad():
        before = base(**rows).logits
        whole = PeftModel.from_pretrained(base, out).eval()
        logits = silo.model(**rows).logits
        assert torch.equal(logits, whole(**rows).logits)
        assert not torch.equal(logits, before), "nothing was learned"
    assert torch.equal(silo.model.generate(**prompts(), **greedy), whole.generate(**prompts(), **greedy))


THREE, ROWS = ("north", "south", "east"), ("north", "south", "south")
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "alternating": {"federation": {"lora": "alternating"}, "train": {**SHORT, "rounds": 2}},
    "frozen-a": {"federation": {"lora": "frozen-a"}},
    "replicas": {"federation": {"lora": "frozen-a"}, "trunk": {"adapter": "replica"}},
    "frozen bottom": {"lora": {"freeze_bottom": True}},
    "buffered": {"federation": {"asynchronous": {"buffer": 1}}},
    "masked": {
        "federation": {"secure": {"masks": True}},
        "silo": [{"name": name, "train": f"{row}.jsonl"} for name, row in zip(THREE, ROWS, strict=True)],
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_an_opened_run_is_the_uncut_model_with_the_exported_adapter(mode: str, tmp_path: Path) -> None:
    """In the whole run directory, and in a folder with what a deployed silo keeps."""
    run = trained(tmp_path, **MODES[mode])
    with open_run(run.path, "south") as silo:
        assert silo.name == "south"
        assert_exact(silo, run, tmp_path / "adapter")
    alone = tmp_path / "alone"
    shutil.copytree(run.role("north").path, alone / "silos" / "north")
    RunDirectory(alone).record(run.recipe())
    with serving(run) as (_, address), open_run(alone, trunk=address) as silo:
        assert silo.name == "north"
        assert_exact(silo, run, tmp_path / "adapter")


def test_a_silo_with_a_rank_of_its_own(tmp_path: Path) -> None:
    """With the run's files it has the exported adapters; alone, those of its rank."""
    silos = [{"name": "north", "train": "north.jsonl"}, {"name": "south", "train": "south.jsonl", "rank": 2}]
    run = trained(tmp_path, federation={"lora": "svd"}, silo=silos)
    with open_run(run.path, "south") as silo:
        assert_exact(silo, run, tmp_path / "adapter")
    alone = tmp_path / "alone"
    shutil.copytree(run.role("south").path, alone / "silos" / "south")
    RunDirectory(alone).record(run.recipe())
    kept = RunDirectory(alone).role("south").shared.load_round(1)["shared"]
    with serving(run) as (_, address), open_run(alone, trunk=address) as silo:
        found = {name: one for part in silo.parts for name, one in adapters.trainable(part).items()}
        assert {min(one.shape) for one in found.values()} == {2}
        assert all(torch.equal(one, kept[name]) for name, one in found.items())


def test_what_is_released_is_charged_and_remembered(run: RunDirectory) -> None:
    ledger = run.role("north").path / "ledger.jsonl"
    before = len(list(read_ledger(ledger).releases()))
    for expected in (before + 1, before + 2):
        with open_run(str(run.path)) as silo, torch.no_grad():
            assert silo.name == "north"
            silo.model(input_ids=torch.tensor([[5, 6]]))
        assert len(list(read_ledger(ledger).releases())) == expected


def test_a_silo_closes_without_a_block_and_is_open_once(run: RunDirectory) -> None:
    silo = open_run(run.path, "north")
    with pytest.raises(LedgerTakenError, match="is writing to the ledger") as taken:
        open_run(run.path, "north")
    assert "close" in taken.value.remedy
    with open_run(run.path, "south") as other:
        assert other.name == "south"
    silo.close()
    silo.close()
    open_run(run.path, "north").close()


def test_silos_are_named(run: RunDirectory, moved: Moved, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no silo 'west'"):
        open_run(run.path, "west")
    with pytest.raises(RunError, match="no folder of silo 'south'") as absent:
        open_run(moved(), "south")
    assert absent.value.remedy == "it holds: north"
    servers = tmp_path / "servers"
    for role in ("trunk", "root"):
        shutil.copytree(run.path / role, servers / role)
    shutil.copy(run.recipe_path, servers)
    with pytest.raises(RunError, match="holds no silo's folder") as served:
        open_run(servers)
    assert "isthmus export" in served.value.remedy


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run directory") as missing:
        open_run(tmp_path)
    assert "'isthmus silo'" in missing.value.remedy


def test_a_run_without_a_finished_round(run: RunDirectory, tmp_path: Path) -> None:
    begun = RunDirectory.create(tmp_path / "begun", run.recipe())
    with pytest.raises(RunError, match="holds no silo's folder"):
        open_run(begun.path)
    for name in ("trunk", "root", "silos/north"):
        (begun.path / name).mkdir(parents=True)
    with pytest.raises(RunError, match="no finished round") as unfinished:
        open_run(begun.path)
    assert "isthmus run --resume" in unfinished.value.remedy


def test_a_trunk_without_a_finished_round(run: RunDirectory, moved: Moved, tmp_path: Path) -> None:
    empty = RunDirectory.create(tmp_path / "empty", run.recipe())
    with serving(empty) as (_, address), pytest.raises(RunError, match="the trunk has no finished round"):
        open_run(moved(), trunk=address)


def test_a_run_that_is_going_on(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "WAIT_SECONDS", 0.0)
    with run.locked(), pytest.raises(RunError, match="another run is still going on"):
        open_run(run.path)
    with open_run(run.path), pytest.raises(RunError, match="in use"), run.locked(seconds=0.0):
        pass


def test_a_silo_whose_trunk_is_nowhere(moved: Moved) -> None:
    with pytest.raises(PeerGoneError, match="no connection to trunk") as gone:
        open_run(moved())
    assert 'trunk="host:port"' in gone.value.remedy
    assert "isthmus trunk RUN_DIR" in gone.value.remedy


def test_a_trunk_of_another_round(run: RunDirectory, moved: Moved) -> None:
    """The trunk went on by a round that this silo does not have, and no root can be asked."""
    copy = RunDirectory(moved().parent / "copy")
    shutil.copytree(run.path, copy.path)
    trunk = copy.role("trunk")
    trunk.save_round(2, trunk.load_round(1))
    with serving(copy, 2) as (_, address), pytest.raises(RunError, match=r"serves round 2; .* has those of round 1"):
        open_run(moved("south"), trunk=address)
    with serving(copy, 1) as (_, address), open_run(copy.path.parent / "south-alone", trunk=address) as silo:
        assert silo.trunk.channel.welcome.completed == 1
    with pytest.raises(RunError, match="has not saved round 7"), serving(copy, 7):
        pass


def test_a_trunk_that_goes_on_does_not_answer_who_stays(run: RunDirectory) -> None:
    """South trains a further round with the trunk that serves north, too: north's ends are of the round before."""
    ids = torch.tensor([[5, 6, 7]])
    copy = RunDirectory(run.path.parent / "goes-on")
    shutil.copytree(run.path, copy.path)
    with (
        serving(copy) as (_, address),
        open_run(copy.path, "north", trunk=address) as north,
        open_run(copy.path, "south", trunk=address) as south,
    ):
        with torch.no_grad():
            north.model(input_ids=ids)
        south.rounds.begin(2, ["south"])
        south.model(input_ids=ids, labels=ids).loss.backward()
        south.rounds.commit(2, 1, 1.0)
        for ask in (
            lambda: north.model(input_ids=ids, use_cache=False),
            lambda: north.model.generate(ids, max_new_tokens=2),
        ):
            with pytest.raises(RunError, match="north has the adapters of round 1"), torch.no_grad():
                ask()
        with torch.no_grad():
            south.model(input_ids=ids)


def test_what_a_silo_lacks_it_gets_from_the_root(run: RunDirectory, moved: Moved) -> None:
    folder = moved()
    shutil.rmtree(folder / "silos" / "north" / "shared")
    with served_here(run) as there:
        RunDirectory(folder).record(at_address(RunDirectory(folder).recipe(), there.root.address))
        with open_run(folder) as silo:
            expected = run.role("root").load_round(1)["shared"]
            found = {name: one for part in silo.parts for name, one in part.named_parameters() if "lora_B" in name}
            assert found
            assert any(torch.equal(one, tensor) for one in found.values() for tensor in expected.values())
    assert RunDirectory(folder).role("north").shared.rounds() == {1}


def test_a_trunk_of_another_run(run: RunDirectory, moved: Moved, tmp_path: Path) -> None:
    """The same recipe, certificates and number of rounds: a trunk that learned something else says so by its name."""
    other = RunDirectory.create(tmp_path / "other", run.recipe())
    with served_here(other) as there, silos_here(there, other):
        pass
    with serving(other) as (_, address), pytest.raises(RunError, match="the trunk is of another run") as mixed:
        open_run(moved(), trunk=address)
    assert "isthmus trunk RUN_DIR" in mixed.value.remedy


def test_a_trunk_with_another_cut_or_model(run: RunDirectory, moved: Moved, tmp_path: Path) -> None:
    model = run.recipe().model
    with serving(run) as (_, address):
        with pytest.raises(MismatchError, match=r"north has model\.bottom = 2, the trunk 1"):
            open_run(moved("north", model=model.model_copy(update={"bottom": 2})), trunk=address)
        save_tiny_model("llama", tmp_path / "model", seed=3)
        with pytest.raises(MismatchError, match="different base models"):
            open_run(moved("south", model=model.model_copy(update={"path": str(tmp_path / "model")})), trunk=address)


def test_a_model_folder_half_downloaded_or_without_certificates(run: RunDirectory, moved: Moved) -> None:
    recipe = run.recipe()
    half = moved().parent / "half"
    shutil.copytree(recipe.model.path, half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    model = recipe.model.model_copy(update={"path": str(half)})
    with pytest.raises(ModelError):
        open_run(moved("south", model=model))
    bare = RunDirectory(half.parent / "north-alone")
    wire = recipe.wire.model_copy(update={"certificates": str(half / "none")})
    bare.record(recipe.model_copy(update={"wire": wire}))
    with pytest.raises(IdentityError):
        open_run(bare.path)
    open_run(run.path).close()
