"""Devices by name, and what of a trunk is on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.audit.attack import AttackPlan, run_attacks
from isthmus.audit.target import Target
from isthmus.errors import RecipeError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.model.device import find_device
from isthmus.silo.join import join
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.attention_kernels import attend_padded, kernel_for
from isthmus.trunk.service import TrunkService
from tests.conftest import make_recipe, plan_of, save_tiny_model

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


def test_the_processor_is_always_there() -> None:
    assert find_device("cpu") == CPU


def test_auto_takes_what_there_is() -> None:
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_device_that_torch_lacks_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="cuda:99") as refused:
        find_device("cuda:99")
    assert "set the device to 'cpu' or 'auto'" in refused.value.remedy


def test_without_cuda_the_remedy_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for version, remedy in ((None, "install a build of torch"), ("13.0", "check the driver")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(RecipeError) as refused:
            find_device("cuda")
        assert refused.value.remedy.startswith(remedy)


def test_a_trunk_does_not_start_on_a_device_that_is_not_there(tmp_path: Path) -> None:
    recipe = make_recipe(save_tiny_model("llama", tmp_path / "model"), trunk={"device": "cuda:99"})
    with pytest.raises(RecipeError, match="there is no device 'cuda:99' here"):
        TrunkService(recipe, RoleDirectory(tmp_path / "trunk"))


def test_a_silo_does_not_start_on_a_device_that_is_not_there(tmp_path: Path) -> None:
    silo = {"name": "a", "train": "rows.jsonl", "device": "cuda:99"}
    recipe = make_recipe(save_tiny_model("llama", tmp_path / "model"), silo=[silo])
    with pytest.raises(RecipeError, match="there is no device 'cuda:99' here"):
        join(recipe, "a")


def test_no_attack_is_made_on_a_device_that_is_not_there(tmp_path: Path) -> None:
    recipe = make_recipe(save_tiny_model("llama", tmp_path / "model"), silos=("a", "b"))
    with pytest.raises(RecipeError, match="there is no device 'cuda:99' here"):
        run_attacks(Target(recipe), AttackPlan(device="cuda:99"), lambda told: None)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:one", "cpu:0", ""])
def test_a_name_that_is_no_device_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"trunk\.device"):
        make_recipe(tmp_path, trunk={"device": name})
    with pytest.raises(RecipeError, match=r"silo.*device"):
        make_recipe(tmp_path, silo=[{"name": "a", "train": "rows.jsonl", "device": name}])


def test_the_trunk_may_have_a_dtype_of_its_own(tmp_path: Path) -> None:
    recipe = make_recipe(save_tiny_model("llama", tmp_path / "model"), trunk={"dtype": "bfloat16"})
    service = TrunkService(recipe, RoleDirectory(tmp_path / "trunk"))
    assert service._runner.dtype == torch.bfloat16
    service.stop()


def test_a_part_is_loaded_to_its_device_whole(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(save_tiny_model("llama", tmp_path)))
    part = load_part(checkpoint, Cut(1, 1), "trunk", device=ELSEWHERE)
    places = {tensor.device for tensor in [*part.parameters(), *part.buffers()]}
    assert places == {ELSEWHERE}


def test_kernels_are_for_accelerators_and_plain_attention() -> None:
    assert kernel_for(plan_of("sdpa"), CPU, torch.float32) is None
    assert kernel_for(plan_of("eager"), ELSEWHERE, torch.float32) is None
    assert kernel_for(plan_of("sdpa"), ELSEWHERE, torch.bfloat16) is attend_padded
