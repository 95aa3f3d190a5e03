"""A whole federation behind one socket. With Ray's processes: ``tests/integration/test_flower_simulation.py``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from isthmus.engines.flower.courier.delivery import Courier
from isthmus.engines.flower.courier.letters import ask
from isthmus.engines.flower.simulated import run_simulated, simulate
from isthmus.engines.local import create_run
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from tests.features.engines.test_flower_rounds import Post
from tests.integration.processes import run_here, write_federation


def test_it_trains_what_a_run_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = write_federation(tmp_path / "federation", train={"rounds": 2, "steps": 3, "evaluate": False})
    run_here(recipe, tmp_path / "plain")
    run, box = create_run(Recipe.read(recipe), tmp_path / "run"), tmp_path / "box"
    post = Post({number: {"partition-id": number, "num-partitions": 3} for number in range(3)})
    courier = Courier(post, lambda letter: ask(box, letter, patience=30.0), 0.0, {"socket": str(box)})
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(simulate, run, box)
        while courier.carry(0.05):
            assert not done.done() or done.result() is None
        done.result(60)
    found, expected = run.role("root").load_round(2)["shared"], _plain(tmp_path / "plain")
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    assert any("there are 2 silos, and this is node 3" in one for one in caplog.messages)


def _plain(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = RunDirectory.open(path).role("root").load_round(2)["shared"]
    return tensors


def test_a_recipe_that_cannot_be_read_is_an_error_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_simulated([str(tmp_path / "none.toml"), str(tmp_path / "run"), str(tmp_path / "box")]) == 1
    assert "error: " in capsys.readouterr().err
