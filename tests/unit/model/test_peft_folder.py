"""Starting from a PEFT folder: all parts have its tensors, and a folder that does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from isthmus.errors import IsthmusError, ModelError, NotSupportedError
from isthmus.federation.planner import shared_tensors
from isthmus.model import adapters
from isthmus.model.peft_folder import CONFIG, WEIGHTS, PeftFolder
from isthmus.recipe import Recipe
from isthmus.silo.join import join
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from tests.conftest import make_recipe, save_tiny_model, uncut
from tests.oracle.twins import assert_same, loopback, lora_of, ragged, random_b

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
LORA = {"rank": 4, "alpha": 6.0}


def save_adapter(model: Path, folder: Path, **config: Any) -> Path:
    """An adapter with values everywhere, by plain peft."""
    settings = {"r": 4, "lora_alpha": 6.0, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    whole = get_peft_model(uncut(model), LoraConfig(**settings))
    with torch.no_grad():
        for name, value in random_b({name: one for name, one in lora_of(whole).items() if "lora_" in name}).items():
            lora_of(whole)[name].copy_(value)
    whole.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(model, tmp_path_factory.mktemp("adapter"))


def recipe_of(model: Path, start: Path, **lora: Any) -> Recipe:
    return make_recipe(model, lora={**LORA, "start": str(start), **lora}, model={"bottom": 2, "top": 1})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["list", "all-linear", "rslora", "half"])
def test_all_parts_start_from_it(kind: str, model: Path, tmp_path: Path) -> None:
    """The split model is the uncut one with that adapter, and the root's first tensors are the folder's."""
    more: dict[str, Any] = {"all-linear": {"target_modules": "all-linear"}, "rslora": {"use_rslora": True}}.get(
        kind, {}
    )
    folder = save_adapter(model, tmp_path / "adapter", **more)
    if kind == "half":  # values of 16 bits become fp32, as peft reads them
        save_file({k: v.half() for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, {"format": "pt"})
    lora = {"all-linear": {"targets": "all-linear"}, "rslora": {"rslora": True}}.get(kind, {})
    recipe = recipe_of(model, folder, **lora)
    service = TrunkService(recipe, RoleDirectory(tmp_path / "trunk"))
    silo = join(recipe, "a", channel=loopback(service, "a", recipe))
    whole = PeftModel.from_pretrained(uncut(model), str(folder)).eval()
    parts = (*silo.parts, service._runner.part)
    own = {name: one for part in parts for name, one in adapters.adapter_of(part).items()}
    assert_same(own, dict(lora_of(whole)), 0.0)
    batch = ragged("left", lengths=(12, 12))
    assert torch.equal(silo.model(**batch).logits, whole(**batch).logits)
    shared = shared_tensors(recipe)
    assert shared
    assert all(torch.equal(shared[name], own[name]) for name in shared)
    silo.close()
    service.stop()


def test_its_digest_is_of_its_content(model: Path, plain: Path, tmp_path: Path) -> None:
    again = shutil.copytree(plain, tmp_path / "elsewhere")
    first = adapters.start_digest(recipe_of(model, plain))
    assert first == adapters.start_digest(recipe_of(model, again))
    assert adapters.start_digest(make_recipe(model)) == ""
    tensors = load_file(again / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1e-6
    save_file(tensors, again / WEIGHTS, {"format": "pt"})
    assert first != adapters.start_digest(recipe_of(model, again))
    assert first != PeftFolder(plain, {"r": 4}, PeftFolder.read(plain).tensors).digest


def set_key(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | values
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return changed


def first_of(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


BAD: dict[str, tuple[Callable[[Path], Any], type[IsthmusError], tuple[str, ...]]] = {
    "another base": (set_key(base_model_name_or_path="org/other-7b"), ModelError, ("org/other-7b", "model.path is")),
    "another rank": (set_key(r=8), ModelError, ("r = 8", "lora.rank = 4")),
    "another alpha": (set_key(lora_alpha=16), ModelError, ("lora_alpha = 16", "lora.alpha = 6")),
    "another scale": (set_key(use_rslora=True), ModelError, ("use_rslora = True", "lora.rslora = False")),
    "dora": (set_key(use_dora=True), NotSupportedError, ("use_dora",)),
    "modules_to_save": (set_key(modules_to_save=["lm_head"]), NotSupportedError, ("modules_to_save",)),
    "bias": (set_key(bias="all"), NotSupportedError, ("bias = all",)),
    "lora_bias": (set_key(lora_bias=True), NotSupportedError, ("lora_bias",)),
    "layers_to_transform": (set_key(layers_to_transform=[1]), NotSupportedError, ("layers_to_transform",)),
    "rank_pattern": (set_key(rank_pattern={"q_proj": 2}), NotSupportedError, ("rank_pattern",)),
    "alpha_pattern": (set_key(alpha_pattern={"q_proj": 2}), NotSupportedError, ("alpha_pattern",)),
    "target_parameters": (set_key(target_parameters=["experts.down"]), NotSupportedError, ("target_parameters",)),
    "pissa": (set_key(init_lora_weights="pissa"), NotSupportedError, ("init_lora_weights = pissa",)),
    "a key to come": (set_key(use_marvel=True), NotSupportedError, ("use_marvel",)),
    "no lora": (set_key(peft_type="IA3"), NotSupportedError, ("IA3",)),
    "a missing tensor": (
        change_tensors(lambda tensors: tensors.pop(first_of(tensors))),
        ModelError,
        ("lacks", "layers.0.self_attn.q_proj.lora_A"),
    ),
    "a tensor more": (
        change_tensors(lambda tensors: tensors.update({"base_model.model.boundary_gate.weight": torch.ones(3)})),
        ModelError,
        ("beyond", "boundary_gate"),
    ),
    "layers more": (
        change_tensors(
            lambda tensors: tensors.update({f"{first_of(tensors).replace('q_proj', 'k_proj')}": torch.ones(4, 32)})
        ),
        ModelError,
        ("k_proj, q_proj, v_proj", "lora.targets are q_proj, v_proj"),
    ),
    "a shape": (
        change_tensors(lambda tensors: tensors.update({first_of(tensors): torch.ones(4, 31)})),
        ModelError,
        ("(4, 31)", "(4, 32)"),
    ),
    "nan": (
        change_tensors(lambda tensors: tensors.update({first_of(tensors): torch.full((4, 32), torch.nan)})),
        ModelError,
        ("NaN",),
    ),
    "whole numbers": (
        change_tensors(lambda tensors: tensors.update({first_of(tensors): torch.ones(4, 32, dtype=torch.int8)})),
        ModelError,
        ("torch.int8",),
    ),
    "no tensors": (lambda folder: (folder / WEIGHTS).unlink(), ModelError, (WEIGHTS,)),
    "half a file": (lambda folder: (folder / WEIGHTS).write_bytes(b"12"), ModelError, ("no readable",)),
    "no configuration": (lambda folder: (folder / CONFIG).write_text("{"), ModelError, ("no readable",)),
    "no folder": (shutil.rmtree, ModelError, ("no readable",)),
}


@pytest.mark.parametrize("bad", BAD)
def test_an_adapter_that_does_not_fit_is_refused_by_every_party(
    bad: str, model: Path, plain: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(plain, tmp_path / "adapter")
    damage, kind, words = BAD[bad]
    damage(folder)
    recipe = recipe_of(model, folder)
    parties = [
        lambda: shared_tensors(recipe),
        lambda: TrunkService(recipe, RoleDirectory(tmp_path / "trunk")),
        lambda: join(recipe, "a", channel=object()),  # type: ignore[arg-type]
    ]
    for party in parties if bad in ("another rank", "nan") else parties[:1]:
        with pytest.raises(kind) as caught:
            party()
        assert all(word in caught.value.message for word in words), caught.value.message
        assert caught.value.remedy


def test_a_base_on_this_machine_is_known_by_its_fingerprint(model: Path, plain: Path, tmp_path: Path) -> None:
    other = save_tiny_model("llama", tmp_path / "other" / model.name, seed=3)
    with pytest.raises(ModelError, match="the base model"):
        shared_tensors(recipe_of(other, plain))
    moved = shutil.copytree(model, tmp_path / "renamed")
    assert shared_tensors(recipe_of(moved, plain))


@pytest.mark.parametrize("name", [None, "", "some/where/model0", "model0"])
def test_a_base_elsewhere_is_known_by_its_name(name: str | None, model: Path, plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "adapter")
    set_key(base_model_name_or_path=name and name.replace("model0", model.name))(folder)
    assert shared_tensors(recipe_of(model, folder))


def test_layers_that_the_recipe_leaves_out_are_refused(model: Path, plain: Path) -> None:
    with pytest.raises(ModelError, match="beyond what the recipe trains"):
        shared_tensors(recipe_of(model, plain, freeze_bottom=True))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_base_weights_beside_the_adapter_are_refused_with_how_to_leave_them_out(model: Path, tmp_path: Path) -> None:
    """peft copies the base's head into the folder where the head has an adapter."""
    targets = ["q_proj", "lm_head"]
    start = save_adapter(model, tmp_path, target_modules=targets)
    with pytest.raises(ModelError, match=r"weights of the base model beside it: lm_head\.base_layer") as caught:
        adapters.starting_tensors(uncut(model).config, recipe_of(model, start, targets=targets))
    assert "save_embedding_layers=False" in caught.value.remedy


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_that_a_merge_would_tear_are_refused(target: str, tmp_path: Path) -> None:
    """Merged into tied weights, a head's adapter would change the embedding, too; the embedding is not linear."""
    tied = save_tiny_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(NotSupportedError, match=target) as caught:
        shared_tensors(make_recipe(tied, lora={"targets": ["q_proj", target]}))
    assert f"leave {target} out of lora.targets" in caught.value.remedy


def test_a_run_does_not_go_on_from_an_adapter_that_was_changed(model: Path, plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "adapter")
    recipe, directory = recipe_of(model, folder), RoleDirectory(tmp_path / "trunk")
    for _ in range(2):
        TrunkService(recipe, directory).stop()
    tensors = load_file(folder / WEIGHTS)
    save_file({name: 2 * one for name, one in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match="another adapter than when this run began") as caught:
        TrunkService(recipe, directory)
    assert "put the first one back" in caught.value.remedy
