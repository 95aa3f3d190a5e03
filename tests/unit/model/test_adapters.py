"""Adapters: under the uncut model's names, the same A everywhere, and exported as plain peft reads them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from isthmus.errors import ModelError
from isthmus.federation.planner import shared_tensors
from isthmus.model import adapters, families
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, empty_part, load_part, part_of_blocks
from isthmus.recipe import LoraSection
from isthmus.silo.join import load_ends
from tests.conftest import make_recipe, save_tiny_model, targets_of, tiny_config, uncut
from tests.oracle.twins import FAMILIES, Twins, distance, lora_of, make_twins, ragged, save_vivid_model

LORA = LoraSection(rank=4, alpha=6.0)
CUT = Cut(1, 2)
PRINT_A = """
import hashlib, sys
from isthmus.model import adapters, families
from isthmus.model.checkpoint import Checkpoint
from tests.conftest import make_recipe
config = Checkpoint(sys.argv[1]).config
for seed in (3, 4):
    recipe = make_recipe(sys.argv[1], seed=seed, lora={"rank": 4, "alpha": 6.0}, model={"bottom": 1, "top": 2})
    tensors = adapters.initial_tensors(config, recipe)
    print({name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(params=FAMILIES)
def twins(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Twins]:
    folder = save_vivid_model(request.param, tmp_path / "model")
    recipe = make_recipe(folder, lora={"targets": targets_of(request.param), "rank": 4, "alpha": 6.0})
    twins = make_twins(recipe, tmp_path / "trunk")
    yield twins
    twins.close()


def part_of(folder: Path, name: str, lora: LoraSection = LORA, seed: int = 0, *, freeze_a: bool = True) -> Part:
    part = load_part(Checkpoint(str(folder)), CUT, name)  # type: ignore[arg-type]
    adapters.add_adapter(part, lora, seed, freeze_a=freeze_a)
    return part


def of_all(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    parts = [part_of(folder, name, seed=seed) for name in ("bottom", "trunk", "top")]
    return {name: tensor for part in parts for name, tensor in adapters.adapter_of(part).items()}


def test_the_ends_own_layers_are_shared_and_start_alike_in_silo_and_trunk(folder: Path) -> None:
    recipe = make_recipe(folder, boundary={"width": 5, "residual": True}, model={"bottom": 1, "top": 2})
    checkpoint = Checkpoint(str(folder))
    bottom, top = load_ends(checkpoint, recipe)
    shapes = adapters.shared_shapes([bottom, top])
    shared = shared_tensors(recipe)
    assert {name: tuple(tensor.shape) for name, tensor in shared.items()} == shapes
    own = {name: tensor for part in (bottom, top) for name, tensor in adapters.trainable(part).items()}
    assert all(torch.equal(shared[name], tensor) for name, tensor in own.items())
    assert torch.linalg.matrix_norm(shared["boundary_down.weight"]) > 1
    assert not shared["boundary_gate.weight"].any()
    whole = make_recipe(folder, boundary={"residual": True}, model={"bottom": 1, "top": 2})
    assert shared_tensors(whole)["boundary_gate.weight"].tolist() == [1.0] * 32
    assert (shapes["boundary_down.weight"], shapes["boundary_gate.weight"]) == ((5, 32), (32,))
    trunk = load_part(checkpoint, CUT, "trunk")
    adapters.add_trained_layers(trunk, recipe)
    down_WD, up_DW = (
        adapters.adapter_of(bottom)["boundary_down.weight"],
        adapters.adapter_of(trunk)["boundary_up.weight"],
    )
    assert torch.equal(down_WD, up_DW.T)
    assert torch.allclose(down_WD @ up_DW, torch.eye(5), atol=1e-6)


def test_a_bottleneck_as_wide_as_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"boundary\.width is 32") as caught:
        load_ends(Checkpoint(str(folder)), make_recipe(folder, boundary={"width": 32}))
    assert "boundary.width" in caught.value.remedy


@torch.no_grad()
def test_export_is_read_by_plain_peft(twins: Twins, tmp_path: Path) -> None:
    recipe_lora = LoraSection(rank=4, alpha=6.0, targets=tuple(twins.whole.peft_config["default"].target_modules))
    folder = tmp_path / "model"
    adapters.write_adapter(tmp_path / "out", twins.split_adapter(), recipe_lora, str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's, of transformers
        read = PeftModel.from_pretrained(uncut(folder), str(tmp_path / "out")).eval()
    plain, batch = uncut(folder), ragged("left")
    real = batch["attention_mask"].bool()
    split, whole, base = (model(**batch).logits[real] for model in (twins.split, read, plain))
    assert (split - whole).abs().max() <= 1e-5
    assert (split - base).abs().max() > 1e-2


def test_export_writes_what_peft_names(folder: Path, tmp_path: Path) -> None:
    tensors = of_all(folder)
    adapters.write_adapter(tmp_path, tensors, LORA, "some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (4, 6.0, {"q_proj", "v_proj"})
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "CAUSAL_LM")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in stored} == set(tensors)
    assert all(torch.equal(stored[f"base_model.model.{name}"], tensor) for name, tensor in tensors.items())


def test_names_are_the_uncut_models(folder: Path, tmp_path: Path) -> None:
    twins = make_twins(make_recipe(folder), tmp_path)
    names = twins.split_adapter().keys()
    assert names == lora_of(twins.whole).keys()
    assert {int(name.split(".")[2]) for name in names} == set(range(5))
    twins.close()


def test_a_is_the_same_in_every_process_and_another_for_another_seed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", PRINT_A, str(folder)]
    there = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout.splitlines()
    monkeypatch.setattr(sys, "argv", ["-c", str(folder)])
    torch.manual_seed(99)
    exec(PRINT_A, {})
    assert capsys.readouterr().out.splitlines() == there
    assert len(there) == 2
    assert there[0] != there[1]
    assert "lora_A" in there[0]


def test_every_a_is_its_own_draw_within_pefts_bounds(folder: Path) -> None:
    first, again, other = of_all(folder), of_all(folder), of_all(folder, seed=1)
    a = [name for name in first if "lora_A" in name]
    assert len(a) == len(first) // 2 == 10
    for name in a:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert 0.9 < float(first[name].abs().max()) * 32**0.5 <= 1.0
    assert len({first[name].numpy().tobytes() for name in a}) == len(a)
    assert all(not first[name].any() for name in first if "lora_B" in name)


def test_initial_tensors_are_those_of_the_ends(folder: Path) -> None:
    recipe = make_recipe(folder, lora=LORA.model_dump(), model={"bottom": CUT.bottom, "top": CUT.top})
    initial = adapters.initial_tensors(Checkpoint(str(folder)).config, recipe)
    ends = [part_of(folder, name) for name in ("bottom", "top")]
    own = {name: tensor for part in ends for name, tensor in adapters.adapter_of(part).items()}
    assert initial.keys() == own.keys()
    assert all(torch.equal(initial[name], own[name]) for name in own)
    assert adapters.shared_shapes(ends) == {
        name: tuple(tensor.shape) for name, tensor in own.items() if "lora_B" in name
    }


def test_a_frozen_bottom_has_no_adapter_and_all_roles_agree(folder: Path) -> None:
    recipe = make_recipe(folder, lora={"freeze_bottom": True}, model={"bottom": 1, "top": 2})
    checkpoint = Checkpoint(str(folder))
    bottom, top = load_ends(checkpoint, recipe)
    assert not adapters.adapter_of(bottom)
    assert not any(parameter.requires_grad for parameter in bottom.parameters())
    assert {int(name.split(".")[2]) for name in adapters.adapter_of(top)} == {3, 4}
    shared = {name: tuple(tensor.shape) for name, tensor in shared_tensors(recipe).items()}
    assert shared == adapters.shared_shapes([bottom, top])
    initial = adapters.initial_tensors(checkpoint.config, recipe)
    assert initial.keys() == adapters.adapter_of(top).keys()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
def test_export_of_a_frozen_bottom_is_read_by_plain_peft(folder: Path, tmp_path: Path) -> None:
    """Without a warning that adapters are missing: peft gives bottom's layers none."""
    recipe = make_recipe(folder, lora={"freeze_bottom": True}, model={"bottom": 2, "top": 1})
    twins = make_twins(recipe, tmp_path / "trunk")
    adapters.write_adapter(tmp_path / "out", twins.split_adapter(), recipe.lora, str(folder))
    read = PeftModel.from_pretrained(uncut(folder), str(tmp_path / "out")).eval()
    assert lora_of(read).keys() == twins.split_adapter().keys()
    batch = ragged("left")
    real = batch["attention_mask"].bool()
    split, whole, plain = (model(**batch).logits[real] for model in (twins.split, read, uncut(folder)))
    assert (split - whole).abs().max() <= 1e-5
    assert not torch.equal(whole, plain)
    twins.close()


@pytest.mark.parametrize("freeze", [True, False])
def test_what_trains(folder: Path, freeze: bool) -> None:
    part = part_of(folder, "trunk", freeze_a=freeze)
    kinds = {name.split(".")[-2] for name in adapters.trainable(part)}
    assert kinds == ({"lora_B"} if freeze else {"lora_A", "lora_B"})
    assert list(adapters.trainable(part)) == sorted(adapters.trainable(part))
    trains = [name for name, parameter in part.model.named_parameters() if parameter.requires_grad]
    assert len(trains) == len(adapters.trainable(part))


@pytest.mark.parametrize(
    ("lora", "shared", "by_round"),
    [
        ("frozen-a", {"lora_B"}, [{"lora_B"}] * 3),
        ("alternating", {"lora_A", "lora_B"}, [{"lora_B"}, {"lora_A"}, {"lora_B"}]),
        ("plain", {"lora_A", "lora_B"}, [{"lora_A", "lora_B"}] * 3),
    ],
)
def test_what_is_shared_and_what_trains_in_which_round(
    folder: Path, lora: str, shared: set[str], by_round: list[set[str]]
) -> None:
    """What is no factor of LoRA trains in all of them."""
    recipe = make_recipe(folder, boundary={"residual": True}, federation={"lora": lora})
    tensors = shared_tensors(recipe)

    def kinds(names: Iterable[str]) -> set[str]:
        return {name.split(".")[-2] for name in names}

    assert kinds(tensors) == shared | {"boundary_gate"}
    for round, expected in enumerate(by_round, start=1):
        assert kinds(adapters.select_factors(tensors, adapters.trained_factors(lora, round))) == expected | {
            "boundary_gate"
        }


@pytest.mark.parametrize("targets", [("no_such",), ("c_attn", "c_proj"), ("q_proj", "no_such")])
def test_an_unknown_target(folder: Path, targets: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match=r"has no layers named (no_such|c_attn, c_proj)\n") as caught:
        part_of(folder, "top", LoraSection(targets=targets))
    assert "lora.targets" in caught.value.remedy


def test_a_target_that_takes_no_adapter(folder: Path) -> None:
    with pytest.raises(ModelError, match="LoRA does not support the layers mlp of the top") as caught:
        part_of(folder, "top", LoraSection(targets=("mlp",)))
    assert "lora.targets" in caught.value.remedy


def test_load_adapter_sets_what_is_given_and_copies_are_apart(folder: Path) -> None:
    part = part_of(folder, "bottom")
    before = adapters.adapter_of(part)
    name = next(name for name in before if "lora_B" in name)
    adapters.load_adapter(part, {name: torch.ones_like(before[name]), "foreign": torch.ones(1)})
    after = adapters.adapter_of(part)
    assert not before[name].any()
    assert {one for one in after if not torch.equal(after[one], before[one])} == {name}
    after[name].zero_()
    assert adapters.adapter_of(part)[name].all()


def test_a_fresh_adapter_changes_nothing(folder: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    plain = load_part(Checkpoint(str(folder)), CUT, "bottom").hidden(input_ids=ids, use_cache=False)
    assert torch.equal(part_of(folder, "bottom").hidden(input_ids=ids, use_cache=False), plain)


def test_rank_alpha_scale_the_update(folder: Path) -> None:
    """h + (alpha / rank) · B·A·x, written out."""
    part = part_of(folder, "bottom")
    layer = part.model.model.layers[0].self_attn.q_proj
    tensors = {name: torch.randn_like(tensor) for name, tensor in adapters.adapter_of(part).items()}
    adapters.load_adapter(part, tensors)
    x = torch.randn(3, 32)
    a, b = (tensors[f"model.layers.0.self_attn.q_proj.lora_{kind}.weight"] for kind in "AB")
    expected = x @ layer.base_layer.weight.T + 6.0 / 4 * (x @ a.T @ b.T)
    assert distance(layer(x).detach(), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
@pytest.mark.parametrize("family", families.FAMILIES)
def test_all_linear_are_the_layers_that_peft_takes(family: str) -> None:
    """A family's text part, but for mixtures that are refused."""
    config, lora, found = tiny_config(family), LoraSection(rank=2, targets=("all-linear",)), set()
    parts = [empty_part(config, CUT, name) for name in ("bottom", "trunk", "top")]  # type: ignore[arg-type]
    for part in parts:
        if family in ("deepseek_v3", "llama4", "llama4_text", "mixtral", "qwen3_moe"):
            continue
        adapters.add_adapter(part, lora, 0, freeze_a=False)
        found |= set(adapters.adapter_parameters(part))
    if found:
        model = families.uncut_shapes(copy.deepcopy(config))
        names = lora_of(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")))
        assert found == {name for name in names if "vision_tower" not in name and "projector" not in name}


@pytest.mark.parametrize(
    ("family", "target"),
    [
        *((family, "all-linear") for family in ("deepseek_v3", "llama4_text", "mixtral", "qwen3_moe")),
        ("llama4_text", "router"),
    ],
)
def test_experts_and_routers_are_refused(family: str, target: str) -> None:
    """peft adapts experts by other code, and llama4's router not at all: it gives more than a linear layer."""
    part = part_of_blocks(tiny_config(family), "trunk", range(4))
    with pytest.raises(ModelError, match=f"experts or routers of a {family} model"):
        adapters.add_adapter(part, LoraSection(rank=2, targets=(target,)), 0, freeze_a=False)
