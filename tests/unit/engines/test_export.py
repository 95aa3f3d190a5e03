"""A finished run's adapter: whole, and as a PEFT folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from isthmus.engines import export
from isthmus.errors import RunError
from isthmus.storage.record import RunDirectory


def test_the_whole_adapter_is_that_of_bottom_trunk_and_top(run: RunDirectory) -> None:
    rounds, tensors = export.final_adapter(run)
    assert rounds == 1
    blocks = {int(name.split("layers.")[1].split(".")[0]) for name in tensors}
    assert blocks == set(range(5))
    shared = run.role("root").load_round(1)["shared"]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in shared.items())


def test_an_export_is_a_peft_folder(run: RunDirectory, tmp_path: Path) -> None:
    assert export.export_adapter(run, tmp_path / "out") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_run_without_a_finished_round_has_no_adapter(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished round"):
        export.export_adapter(RunDirectory.create(tmp_path / "new", run.recipe()), tmp_path / "out")


def test_a_narrow_boundary_cannot_be_exported(run: RunDirectory, tmp_path: Path) -> None:
    recipe = run.recipe()
    narrow = recipe.model_copy(update={"boundary": recipe.boundary.model_copy(update={"width": 4})})
    with pytest.raises(RunError, match="no adapter of the uncut model"):
        export.export_adapter(RunDirectory.create(tmp_path / "new", narrow), tmp_path / "out")


@pytest.mark.parametrize(
    ("copied", "told"),
    [
        ("silos", "lacks the trunk's adapter (trunk/rounds) and that of the ends (root/rounds)"),
        ("trunk", "lacks that of the ends (root/rounds)"),
        ("root", "lacks the trunk's adapter (trunk/rounds)"),
    ],
)
def test_a_partys_own_folder_says_what_is_missing(run: RunDirectory, tmp_path: Path, copied: str, told: str) -> None:
    shutil.copytree(run.path / copied, tmp_path / "own" / copied)
    shutil.copy(run.recipe_path, tmp_path / "own")
    with pytest.raises(RunError, match=re.escape(told)) as refused:
        export.export_adapter(RunDirectory.open(tmp_path / "own"), tmp_path / "out")
    assert "where both trunk and root ran" in refused.value.remedy
