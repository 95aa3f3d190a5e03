"""A federation in Flower's simulation, whose nodes are Ray's processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.flowers import BIN, SuperLink, needs_flower
from tests.integration.processes import Commands, run_here, write_federation
from tests.integration.test_flower_deployment import shared_of

RAY = next(BIN.parent.glob("lib/python*/site-packages/ray"), None)
pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(400),
    needs_flower,
    pytest.mark.skipif(RAY is None, reason="no Ray beside Flower: make build/flower/ready"),
]


def test_three_rounds_train_what_a_run_trains(commands: Commands, tmp_path: Path) -> None:
    recipe = write_federation(tmp_path / "federation", train={"rounds": 3, "steps": 4, "evaluate": False})
    app, run_dir = tmp_path / "app", tmp_path / "run"
    commands.run("flower", recipe, app, "--simulation", "--run-dir", run_dir).succeeded()
    with SuperLink(tmp_path / "flower", simulation=True) as link:
        run = link.run(app, "--federation-config", "num-supernodes=2")
        run_here(recipe, tmp_path / "plain")
        assert run.process.wait(300) == 0, run.output
    found, expected = shared_of(run_dir, 3), shared_of(tmp_path / "plain", 3)
    assert all(torch.equal(found[name], one) for name, one in expected.items()), run.output
