"""Quantized checkpoints: the weights that transformers computes, to the last bit, or a refusal that says what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from isthmus.errors import ModelError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, PartName, load_part
from isthmus.model.quantized import copying, refusal, stored_weights
from tests.conftest import save_tiny_model

PARTS: tuple[PartName, ...] = ("bottom", "trunk", "top")
CUT = Cut(1, 2)
Tensors = dict[str, torch.Tensor]
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": ["lm_head"]}
INT8 = {"quant_method": "compressed-tensors", "format": "int-quantized"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


def configure(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))


def quantize(
    original: Path,
    folder: Path,
    change: Callable[[str, torch.Tensor], Tensors],
    settings: dict[str, Any],
    *,
    of: Callable[[str], bool] = lambda name: "proj" in name,
) -> Path:
    """A copy of a folder whose projections, or other weights, are stored as ``change`` says."""
    shutil.copytree(original, folder)
    stored: Tensors = {}
    for name, weight in load_file(original / "model.safetensors").items():
        stored |= change(name, weight) if of(name) else {name: weight}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, settings)
    return folder


def spread(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def as_fp8(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = (size // 16 for size in weight.shape)
    scales = torch.rand(rows, columns) * 0.01 + 0.001
    values = (weight / spread(scales, 16, 16)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: values, f"{name}_scale_inv": scales}


def as_int8(name: str, weight: torch.Tensor) -> Tensors:
    scales = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    return {name: (weight / scales.float()).round().clamp(-128, 127).to(torch.int8), f"{name}_scale": scales}


def parts_of(folder: Path, dtype: torch.dtype = torch.float32) -> Tensors:
    """All weights of the three parts by their names in the uncut model."""
    found = {}
    for name in PARTS:
        part = load_part(Checkpoint(str(folder)), CUT, name, dtype=dtype)
        found |= {part.uncut_name(own): weight for own, weight in part.model.named_parameters()}
    return found


def same(parts: Tensors, whole: Tensors) -> None:
    assert parts.keys() == whole.keys()
    for name, weight in parts.items():
        assert torch.equal(weight, whole[name]), name


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_fp8_has_the_weights_that_transformers_computes(original: Path, tmp_path: Path, scheme: str) -> None:
    def change(name: str, weight: torch.Tensor) -> Tensors:
        activation = {name.replace("weight", "activation_scale"): torch.tensor(0.5)} if scheme == "static" else {}
        return as_fp8(name, weight) | activation

    folder = quantize(original, tmp_path / "model", change, FP8 | {"activation_scheme": scheme})
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert not torch.equal(
        whole["model.layers.0.mlp.up_proj.weight"],
        load_file(original / "model.safetensors")["model.layers.0.mlp.up_proj.weight"],
    )
    same(parts_of(folder), whole)


def test_experts_in_fp8_have_the_weights_that_transformers_computes(tmp_path: Path) -> None:
    original = save_tiny_model("mixtral", tmp_path / "model")
    folder = quantize(original, tmp_path / "fp8", as_fp8, FP8, of=lambda name: ".experts." in name or "proj" in name)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    same(parts_of(folder), whole)


def compressed(settings: dict[str, Any], strategy: str, *, symmetric: bool) -> dict[str, Any]:
    """The settings that the package compressed-tensors reads. Where it is installed, the test compares with it."""
    weights = {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": symmetric, "dynamic": False}
    weights |= {"group_size": 16} if strategy == "group" else {}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {**settings, "quantization_status": "compressed", "config_groups": groups, "ignore": ["lm_head"]}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_are_value_less_zero_point_times_scale(
    original: Path, tmp_path: Path, strategy: str, symmetric: bool
) -> None:
    expected: Tensors = {}

    def change(name: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        count = {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, columns // 16)}[strategy]
        scales = (torch.rand(count) * 0.01 + 0.001).to(torch.bfloat16)
        values = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
        zero = torch.randint(-5, 5, count, dtype=torch.int8)
        by_value = spread(scales, rows // count[0], columns // count[1])
        zeros = spread(zero, rows // count[0], columns // count[1]).to(torch.bfloat16) * (not symmetric)
        expected[name] = ((values.to(torch.bfloat16) - zeros) * by_value).float()
        stored = {name: values, f"{name}_scale": scales.reshape(-1) if strategy == "tensor" else scales}
        return stored if symmetric else stored | {f"{name}_zero_point": zero}

    settings = compressed(INT8, strategy, symmetric=symmetric)
    folder = quantize(original, tmp_path / "model", change, settings)
    parts = parts_of(folder)
    same({name: parts[name] for name in expected}, expected)
    if find_spec("compressed_tensors") is None:
        return
    from transformers import CompressedTensorsConfig

    dense = CompressedTensorsConfig(dequantize=True)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=dense)
    same(parts, whole.state_dict())


def test_mxfp4_has_the_weights_that_transformers_computes(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored: Tensors = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if name.endswith("_proj") and ".experts." in name:
            experts, rows, columns = weight.shape  # stored the other way round: one row for each output
            stored[f"{name}_blocks"] = torch.randint(0, 256, (experts, columns, rows // 32, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.randint(120, 130, (experts, columns, rows // 32), dtype=torch.uint8)
        else:
            stored[name] = weight
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    configure(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    checkpoint = Checkpoint(str(tmp_path))
    same(checkpoint.read(sorted(checkpoint.weights)), whole)
    same(parts_of(tmp_path), whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "torchao"},
        {"quant_method": "hqq"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "nobody-knows"},
        {},
    ],
    ids=str,
)
def test_other_kinds_are_refused_by_name(original: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="quantized by") as caught:
        stored_weights(["a"], settings, tmp_path)
    method = str(settings.get("quant_method", "bitsandbytes" if settings else "unknown"))
    assert method in caught.value.message
    assert str(settings.get("format", "")) in caught.value.message
    assert "give model.path" in caught.value.remedy


def test_quantized_tensors_without_a_word_in_the_config_are_refused(original: Path, tmp_path: Path) -> None:
    folder = quantize(original, tmp_path / "model", as_int8, {})
    path = folder / "config.json"
    path.write_text((original / "config.json").read_text())
    with pytest.raises(ModelError, match=r"holds model\.layers\.0\..*_scale and \d+ more"):
        parts_of(folder)
    stored = {name: one for name, one in load_file(folder / "model.safetensors").items() if "_scale" not in name}
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"proj\.weight in .* is stored as int8") as caught:
        parts_of(folder)
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.bool])
def test_no_type_without_fractions_is_cast(original: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = quantize(original, tmp_path / "model", lambda name, weight: {name: weight.to(dtype)}, {})
    (folder / "config.json").write_text((original / "config.json").read_text())
    with pytest.raises(ModelError, match="is stored as " + str(dtype).removeprefix("torch.")):
        parts_of(folder)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda name, weight: as_fp8(name, weight) | {f"{name}_scale_inv": torch.ones(3, 3)}, "do not divide"),
        (lambda name, weight: {name: weight, f"{name}_scale_inv": torch.ones(1, 1)}, "not float32"),
        (lambda name, weight: {name: weight.to(torch.float8_e4m3fn)}, "stored as float8_e4m3fn"),
        (lambda name, weight: {f"{name}_scale_inv": torch.ones(1, 1)}, "holds .*_scale_inv"),
        (lambda name, weight: as_fp8(name, weight) | {f"{name}_scale": torch.ones(1)}, "holds .*_scale and"),
    ],
)
def test_damaged_fp8_is_refused(
    original: Path, tmp_path: Path, damage: Callable[[str, torch.Tensor], Tensors], told: str
) -> None:
    folder = quantize(original, tmp_path / "model", damage, FP8)
    with pytest.raises(ModelError, match=told) as caught:
        parts_of(folder)
    assert str(folder) in caught.value.message


def test_the_commands_of_remedies_run(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantize(original, tmp_path / "model", as_fp8, FP8)
    same(parts_of(copied(folder, copying(folder, config="FineGrainedFP8Config"))), parts_of(folder))
    error = refusal("bitsandbytes", {}, original)
    assert "m = m.dequantize(); m.save_pretrained(" in error.remedy
    assert "save_original_format=False" in error.remedy
    same(parts_of(copied(folder, copying(folder, steps=("m = m.to('cpu')",)))), parts_of(folder))


def copied(folder: Path, command: str) -> Path:
    """The copy that a remedy's command saves."""
    found = re.fullmatch(r'python -c "(.*)"', command)
    assert found is not None
    copy = Path(f"{folder}-copy")
    shutil.rmtree(copy, ignore_errors=True)
    exec(found.group(1), {})
    return copy
