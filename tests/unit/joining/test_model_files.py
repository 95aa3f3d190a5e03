"""The files of a silo's parts: exactly what its cut needs, byte by byte, and nothing of the trunk's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from isthmus.errors import ProtocolError
from isthmus.joining import model_files
from isthmus.joining.model_files import ModelFiles
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model

HANG = 60.0


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    model = save_tiny_model("llama", tmp_path / "model", blocks=5)
    silos = [{"name": "a", "train": "a.jsonl"}, {"name": "b", "train": "b.jsonl", "bottom": 2, "top": 1}]
    return make_recipe(model, silo=silos)


def fetch_all(service: ModelFiles, silo: str, folder: Path) -> pb.Listed:
    channel = LoopbackChannel(service, silo)
    listed: pb.Listed = channel.call(pb.Listing())
    for file in listed.files:
        data = b""
        while len(data) < file.size:
            data += channel.call(pb.Fetch(name=file.name, offset=len(data))).data
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(data)
    return listed


@pytest.mark.parametrize(("silo", "blocks"), [("a", {0, 4}), ("b", {0, 1, 4})])
def test_a_silo_gets_the_blocks_of_its_own_cut(
    silo: str, blocks: set[int], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "PIECE_BYTES", 1000)
    listed = fetch_all(ModelFiles(lambda: recipe, tmp_path / "portions"), silo, tmp_path / silo)
    here, whole = load_file(tmp_path / silo / "model" / "model.safetensors"), recipe.model.path
    assert {int(name.split(".")[2]) for name in here if ".layers." in name} == blocks
    assert listed.fingerprint == Checkpoint(whole).fingerprint == Checkpoint(str(tmp_path / silo / "model")).fingerprint
    assert {file.name for file in listed.files} >= {"model/config.json", "model/tokenizer.json", "model/portion.json"}
    for name, tensor in load_file(Path(whole) / "model.safetensors").items():
        assert name not in here or bool((here[name] == tensor).all())


def test_a_silo_gets_the_blocks_of_the_deepest_cut_that_comes(recipe: Recipe, tmp_path: Path) -> None:
    """What it will keep after a move is there when that comes: a party fetches files once."""
    moves = {"moves": [{"after": 1, "bottom": 2}, {"after": 2, "bottom": 1, "top": 2}]}
    moving = make_recipe(Path(recipe.model.path), model=moves)
    fetch_all(ModelFiles(lambda: moving, tmp_path / "portions"), "a", tmp_path / "a")
    here = load_file(tmp_path / "a" / "model" / "model.safetensors")
    assert {int(name.split(".")[2]) for name in here if ".layers." in name} == {0, 1, 3, 4}


def test_the_adapter_that_training_starts_from_comes_too(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "adapter_config.json").write_text("{}")
    started = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"start": str(tmp_path / "start")})})
    listed = fetch_all(ModelFiles(lambda: started, tmp_path / "portions"), "a", tmp_path / "a")
    assert "start/adapter_config.json" in {file.name for file in listed.files}


@pytest.mark.parametrize("name", ["nothing", "model/model-00001-of-00002.safetensors", "../secret", "/etc/passwd"])
def test_no_other_file_is_read(name: str, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "portions" / "1-1").mkdir(parents=True)
    (tmp_path / "portions" / "secret").write_text("s")
    channel: Any = LoopbackChannel(ModelFiles(lambda: recipe, tmp_path / "portions"), "a")
    with pytest.raises(Exception, match=r"no file|the name") as caught:
        channel.call(pb.Fetch(name=name))
    assert caught.value.remedy


def test_beyond_the_end_there_is_nothing(recipe: Recipe, tmp_path: Path) -> None:
    channel = LoopbackChannel(ModelFiles(lambda: recipe, tmp_path / "portions"), "a")
    assert channel.call(pb.Fetch(name="model/config.json", offset=2**40)).data == b""


def test_what_is_left_of_an_earlier_process_is_written_anew(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "portions" / "1-1" / "model").mkdir(parents=True)
    (tmp_path / "portions" / "1-1" / "model" / "half.safetensors").write_bytes(b"half")
    listed = fetch_all(ModelFiles(lambda: recipe, tmp_path / "portions"), "a", tmp_path / "a")
    assert "model/half.safetensors" not in {file.name for file in listed.files}


def test_other_requests_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    channel = LoopbackChannel(ModelFiles(lambda: recipe, tmp_path / "portions"), "a")
    assert channel.call(pb.Ping()) == pb.Pong()
    with pytest.raises(ProtocolError, match="does not answer Current"):
        channel.call(pb.Current())


def test_a_model_that_cannot_be_read_is_an_error_of_the_request(recipe: Recipe, tmp_path: Path) -> None:
    (Path(recipe.model.path) / "model.safetensors").write_bytes(b"x")
    channel = LoopbackChannel(ModelFiles(lambda: recipe, tmp_path / "portions"), "a")
    for _ in range(2):
        with pytest.raises(Exception, match="cannot read"):
            channel.submit(pb.Listing()).result(HANG)
