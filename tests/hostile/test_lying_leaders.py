"""Who leads a federation lies to a silo that joins: no file of the silo's is read or replaced by its word, and no code
of its choice is run."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from isthmus.errors import ModelError
from isthmus.joining.join import OwnFiles, fetch_model, join_federation, own_recipe
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.recipe.shared import OWN_PLACES
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.channel import Answer, answered
from isthmus.wire.server import Server
from tests.conftest import save_tiny_model
from tests.unit.joining.test_join import Coordinator

SENSITIVE = {"sensitivity.function", "sensitivity.names"}
RECIPE: dict[str, Any] = {
    "threads": 64,
    "model": {"path": "/etc", "bottom": 1, "top": 1},
    "wire": {"certificates": "/root/certificates"},
    "lora": {"start": "/etc/ssl"},
    "sensitivity": {
        "detectors": {"name": "high"},
        "classes": {"high": {"noise": 2.0}},
        "function": "subprocess:getoutput",
        "names": "/etc/passwd",
    },
    "silo": [
        {"name": "north", "train": "/etc/shadow", "held_out": ["../../secret.csv", "~/x.csv"], "format": "csv"},
        {"name": "south", "train": "datasets:org/set:train", "device": "cuda"},
    ],
}


@pytest.mark.parametrize("files", [OwnFiles(), OwnFiles(("own.csv",)), OwnFiles(("own.csv",), ("other.csv",))])
def test_no_place_on_a_partys_machine_is_the_leaders_to_name(files: OwnFiles, tmp_path: Path) -> None:
    text = own_recipe(tomli_w.dumps(RECIPE), "north", files)
    values = tomllib.loads(text)
    assert "threads" not in values
    assert values["sensitivity"] == {"detectors": {"name": "high"}, "classes": {"high": {"noise": 2.0}}}
    assert (values["model"]["path"], values["wire"]["certificates"]) == ("model", "certificates")
    assert values["lora"]["start"] == "start"
    (tmp_path / "recipe.toml").write_text(text)
    recipe = Recipe.read(tmp_path / "recipe.toml")
    own = {str(Path(path).resolve()) for path in (*files.train, *files.held_out)}
    for silo in recipe.silo:
        for path in (*(silo.train or ()), *(silo.held_out or ())):
            assert path in own or Path(path).parent == tmp_path, path
        assert (silo.format, silo.columns, silo.device) == (None, None, "cpu")


def test_the_keys_about_a_partys_machine() -> None:
    """Written down: a new key about files, devices or code belongs to them."""
    own = {"silo.train", "silo.held_out", "silo.format", "silo.device", "partition.data", "partition.format"}
    assert own | {"threads", "wire.certificates", "trunk.device", *SENSITIVE} == OWN_PLACES


@pytest.mark.parametrize(
    "name",
    [
        "recipe.toml",
        "certificates/north/key.pem",
        "certificates/north/ca.pem",
        "model/../recipe.toml",
        "/etc/cron.d/job",
        "model/code.py",
        "model/sub/config.json",
        "start/adapter.bin",
        "model",
        "model/.bashrc",
    ],
)
def test_a_server_writes_files_of_a_model_and_no_others(name: str, tmp_path: Path) -> None:
    data = b"evil"

    class Liar:
        def handle(self, peer: str, request: Any) -> Answer:
            if isinstance(request, pb.Listing):
                return answered(pb.Listed(files=[pb.File(name=name, size=len(data), digest="0" * 64)]))
            return answered(pb.Fetched(data=data) if isinstance(request, pb.Fetch) else pb.Pong())

    authority = Authority()
    model = save_tiny_model("llama", tmp_path / "whole")
    folder = tmp_path / "north"
    folder.mkdir()
    server = Server({"Model": Liar()}, authority.issue("trunk"), {"Model": ["north"]}, "localhost:0", 2**20)
    server.start()
    try:
        values = {"model": {"path": str(model), "bottom": 1, "top": 1}, "train": {"rounds": 0, "evaluate": False}}
        recipe = Recipe.of({**values, "trunk": {"address": f"localhost:{server.port}"}, "silo": [{"name": "north"}]})
        with pytest.raises(Exception, match=r"no file of a model|of a file") as caught:
            fetch_model(recipe, authority.issue("north"), folder)
        assert caught.value.remedy
    finally:
        server.stop(0)
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"model_type": "llama"', '"model_type": "new", "auto_map": {"AutoConfig": "code.New"}')
    )
    (folder / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(ModelError):
        _ = Checkpoint(str(folder)).config
    assert not (tmp_path / "run").exists()


def test_joining_says_what_was_left_out(tmp_path: Path) -> None:
    leader, said = Coordinator(tmp_path / "leader"), list[str]()
    values = tomllib.loads(leader.recipe_path.read_text())
    values["sensitivity"] = {"function": "os:system"}
    leader.recipe_path.write_text(tomli_w.dumps(values))
    with leader.serving():
        joined = join_federation(leader.authority.invite("north"), tmp_path / "north", notify=said.append)
    assert "os:system" not in joined.recipe.read_text()
    assert any("left out of the recipe: sensitivity.function" in line for line in said)
