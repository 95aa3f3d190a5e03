"""What a deployed run learned is used from each party's own folder, to the last bit, when the root is long gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import isthmus
from isthmus.errors import PeerGoneError
from isthmus.recipe import Recipe
from tests.conftest import uncut
from tests.integration.processes import Commands, Ended, call, free_port, rows_of, write_federation
from tests.oracle.twins import prompts, ragged

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's, of transformers
]
GREEDY: dict[str, Any] = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20}


def test_a_deployed_run_is_used_from_the_parties_own_folders(
    commands: Commands, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def here(*arguments: object) -> Ended:
        return call(capsys, monkeypatch, *arguments)

    address = {"address": f"localhost:{free_port()}"}
    train = {"rounds": 2, "steps": 3, "evaluate": False, "learning_rate": 0.1}
    recipe = write_federation(
        tmp_path / "made",
        train=train,
        trunk=address,
        root=address,
        federation={"lora": "alternating"},
        model={"path": str(tmp_path / "made" / "model")},
    )
    here("certificates", recipe).succeeded()
    machines = {name: _machine(recipe, name, tmp_path) for name in ("trunk", "north", "south")}
    runs = {name: machine.parent / "run" for name, machine in machines.items()}

    server = commands.start("trunk", machines["trunk"], "--with-root", "--run-dir", runs["trunk"])
    north = commands.start("silo", machines["north"], "north", "--run-dir", runs["north"])
    south = here("silo", machines["south"], "south", "--run-dir", runs["south"])
    south.succeeded()
    assert f"next: isthmus generate {runs['south']} PROMPT --silo south" in south.out
    north.wait().succeeded()
    server.process.terminate()
    ended = server.wait()
    ended.succeeded()
    assert f"next: isthmus export {runs['trunk']} OUT; later: isthmus trunk {runs['trunk']} --with-root" in ended.out

    here("export", runs["north"], tmp_path / "adapter").failed(
        f"{runs['north']} lacks the trunk's adapter", "export where both trunk and root ran"
    )
    here("export", runs["trunk"], tmp_path / "adapter").succeeded()
    base = uncut(Path(Recipe.read(recipe).model.path))
    whole = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    (told,) = json.loads(here("privacy", runs["north"], "--json").out)["statements"]
    assert (told["silo"], told["verified"]) == ("north", True)

    later = commands.start("trunk", runs["trunk"])  # without the root
    assert later.address == address["address"]
    rows = {key: value for key, value in ragged("left", lengths=(24, 24)).items() if key != "labels"}
    for name in ("north", "south"):
        with isthmus.open(runs[name]) as silo, torch.no_grad():
            assert silo.name == name
            assert torch.equal(silo.model(**rows).logits, whole(**rows).logits)
            tokens = silo.model.generate(**prompts(), **GREEDY)
            assert torch.equal(tokens, whole.generate(**prompts(), **GREEDY))
    here("generate", runs["south"], rows_of("south")[0]["text"], "--max-new-tokens", 4).succeeded()
    joined = isthmus.Recipe.read(machines["north"])
    with pytest.raises(isthmus.IsthmusError, match="has learned 2 rounds, but north has no adapters") as fresh:
        isthmus.join(joined, "north")
    assert "isthmus.open" in fresh.value.remedy
    later.process.terminate()
    later.wait().succeeded()
    again = json.loads(here("privacy", runs["north"], "--json").out)["statements"][0]
    assert again["paths"]["forward"]["releases"] > told["paths"]["forward"]["releases"]

    impatient = Path(runs["north"] / "recipe.toml")
    _, _, lines = impatient.read_text().partition("\n")  # the checksum goes, as its line says
    impatient.write_text(lines.replace("deadline = 140.0", "deadline = 0.5"))
    with pytest.raises(PeerGoneError, match="no connection to trunk"):
        isthmus.open(runs["north"])


def _machine(recipe: Path, name: str, folder: Path) -> Path:
    """A folder with what this party is given, and nothing else; returns its copy of the recipe."""
    machine = folder / name
    shutil.copytree(recipe.parent / "certificates" / name, machine / "certificates" / name)
    if name in ("north", "south"):
        shutil.copy(recipe.parent / f"{name}.jsonl", machine)
    return Path(shutil.copy(recipe, machine / "recipe.toml"))
