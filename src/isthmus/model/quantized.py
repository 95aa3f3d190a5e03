"""Quantized checkpoints: which stored tensors make each weight, dequantized as transformers does with
``dequantize=True``. What cannot be dequantized exactly is refused by name.

Letters: N rows and C columns of a weight, n × c of its scales.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from isthmus.errors import ModelError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_ORIGINAL = "give model.path the model that was quantized, in its own 16 or 32 bits"


@dataclass(frozen=True)
class Stored:
    """One weight as a file stores it.

    Args:
        names: the stored tensors that it is computed from.
        compute: gives the weight from them.
    """

    names: tuple[str, ...]
    compute: Callable[[list[torch.Tensor]], torch.Tensor]


def stored_weights(names: Collection[str], settings: Mapping[str, Any] | None, folder: Path) -> dict[str, Stored]:
    """How each weight of a model folder is computed, by the weight's name.

    Stored tensors that belong to no weight keep their own names, so that whoever reads a part finds them left over.

    Args:
        names: of the stored tensors.
        settings: ``quantization_config`` of the folder's configuration; None: it has none.

    Raises:
        ModelError: the kind of quantization is not supported.
    """
    if settings is None:
        return {name: _plain(name) for name in names}
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown"))
    if method == "fp8":
        return _scaled(names, "_scale_inv", {"activation_scale"}, _from_blocks)
    if method == "compressed-tensors" and settings.get("format") in ("int-quantized", "float-quantized"):
        return _scaled(names, "_scale", {"input_scale", "input_zero_point"}, _from_compressed)
    if method == "mxfp4":
        return _mxfp4(names)
    raise refusal(method, settings, folder)


def refusal(method: str, settings: Mapping[str, Any], folder: Path) -> ModelError:
    """The error about a kind of quantization that is not supported, with what its reader can do."""
    detail = f" ({settings['format']})" if settings.get("format") else ""
    remedy = _ORIGINAL
    if method == "bitsandbytes":
        remedy = (
            f"save a dequantized copy and give model.path its folder: {copying(folder, steps=('m = m.dequantize()',))}"
        )
    elif method == "compressed-tensors":
        remedy = (
            "save a dequantized copy and give model.path its folder (needs 'pip install compressed-tensors'): "
            + copying(folder, config="CompressedTensorsConfig")
        )
    return ModelError(f"the weights in {folder} are quantized by {method}{detail}", remedy=remedy)


def copying(folder: Path, *, config: str = "", steps: tuple[str, ...] = (), extra: str = "") -> str:
    """The command that saves a copy of a model folder as transformers loads it.

    Args:
        config: the class of transformers' configuration that takes ``dequantize=True``; empty: none.
        steps: what is done to the loaded model ``m``.
        extra: further arguments for loading model and tokenizer.
    """
    # in the original format, transformers would undo on saving what it did on loading: it would quantize again
    imports = "AutoModelForCausalLM as M, AutoTokenizer as T" + (f", {config}" if config else "")
    dequantize = f", quantization_config={config}(dequantize=True)" if config else ""
    source, out = repr(str(folder)), repr(f"{folder}-copy")
    code = (
        f"from transformers import {imports}",
        f"m = M.from_pretrained({source}, dtype='auto'{extra}{dequantize})",
        *steps,
        f"m.save_pretrained({out}{', save_original_format=False' if config or steps else ''})",
        f"T.from_pretrained({source}{extra}).save_pretrained({out})",
    )
    return f'python -c "{"; ".join(code)}"'


def _plain(name: str) -> Stored:
    return Stored((name,), lambda read: read[0])


def _scaled(
    names: Collection[str], suffix: str, unused: Collection[str], compute: Callable[[list[torch.Tensor]], torch.Tensor]
) -> dict[str, Stored]:
    """Weights stored with a scale, whose name is the weight's and a suffix, and perhaps a zero point.

    Args:
        unused: last parts of names of tensors that quantize activations, which stay as they are here.
    """
    found = {}
    for name in names:
        parts = [name, f"{name}{suffix}", f"{name}_zero_point"]
        scaled = parts[1] in names
        whole = name.removesuffix(suffix).removesuffix("_zero_point")
        if name.rpartition(".")[2] in unused or (whole != name and f"{whole}{suffix}" in names and whole in names):
            continue
        found[name] = Stored(tuple(part for part in parts if part in names), compute) if scaled else _plain(name)
    return found


def _from_blocks(read: list[torch.Tensor]) -> torch.Tensor:
    """An fp8 weight times the scale of each value's block, as transformers' ``Fp8Dequantize``, in fp32."""
    weight_NC, scales_nc = read[:2]
    if len(read) > 2 or weight_NC.dtype not in FP8 or scales_nc.dtype not in (torch.float32, torch.bfloat16):
        kinds = ", ".join(str(one.dtype).removeprefix("torch.") for one in read)
        raise ValueError(f"of fp8 checkpoints, values with scales in fp32 or bf16 are supported, not {kinds}")
    return weight_NC.to(torch.float32) * _spread(scales_nc.to(torch.float32), weight_NC)


def _from_compressed(read: list[torch.Tensor]) -> torch.Tensor:
    """A weight of 8 bits, less its zero point, times its scale, in the scale's type, as compressed-tensors has it."""
    weight_NC, scales_nc, *zero_nc = read
    if weight_NC.dtype not in (torch.int8, *FP8) or not scales_nc.is_floating_point():
        raise ValueError(f"of compressed-tensors, int8 and fp8 are supported, not {weight_NC.dtype}")
    values = weight_NC.to(scales_nc.dtype)
    if zero_nc:
        values = values - _spread(zero_nc[0].to(scales_nc.dtype), weight_NC)
    return values * _spread(scales_nc, weight_NC)


def _spread(scales_nc: torch.Tensor, weight_NC: torch.Tensor) -> torch.Tensor:
    """Scales of blocks, of rows or of the whole weight, repeated for every value."""
    if scales_nc.numel() == 1:
        return scales_nc.reshape(())
    rows, columns = weight_NC.shape[-2:]
    if scales_nc.dim() < 2 or rows % scales_nc.shape[-2] or columns % scales_nc.shape[-1]:
        raise ValueError(f"scales of {list(scales_nc.shape)} do not divide a weight of {list(weight_NC.shape)}")
    by_row = scales_nc.repeat_interleave(rows // scales_nc.shape[-2], -2)
    return by_row if scales_nc.shape[-1] == 1 else by_row.repeat_interleave(columns // scales_nc.shape[-1], -1)


def _mxfp4(names: Collection[str]) -> dict[str, Stored]:
    """Experts stored as blocks of 4-bit numbers and their exponents (gpt-oss), by transformers' own conversion."""
    found = {}
    for name in names:
        whole = name.removesuffix("_blocks").removesuffix("_scales")
        pair = (f"{whole}_blocks", f"{whole}_scales")
        if whole != name and all(one in names for one in pair):
            found[whole] = Stored(pair, lambda read: convert_moe_packed_tensors(*read, dtype=torch.float32))
        else:
            found[name] = _plain(name)
    return found
