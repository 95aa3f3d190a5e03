"""Grouped LoRA: each segment of a pass goes through its own adapter, one by one or all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.recipe import LoraSection
from isthmus.trunk.grouped_lora import AdapterGroups, dropout_mask, group_adapters
from tests.conftest import save_tiny_model

CPU = torch.device("cpu")
SIZES = [3, 1, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def part_of(folder: Path, dtype: torch.dtype = torch.float32, **lora: Any) -> Part:
    part = load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk", dtype=dtype)
    adapters.add_adapter(part, LoraSection(rank=2, **lora), 0, freeze_a=False)
    return part


def adapter(part: Part, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(one.shape, generator=draw) for name, one in adapters.adapter_of(part).items()}


def layer_of(part: Part) -> torch.nn.Module:
    return next(one for name, one in part.model.named_modules() if name.endswith("q_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [False, True])
@torch.no_grad()
def test_each_segment_goes_through_its_adapter(folder: Path, at_once: bool, dtype: torch.dtype) -> None:
    """In fp32 whatever the base's type, whose type the result has, as peft computes it. How much peft itself rounds, on
    some processors more than on others, 64 bits tell."""
    grouped, plain, exact = (part_of(folder, dtype) for _ in range(3))
    exact.double()
    groups = group_adapters(grouped, at_once=at_once)
    x_1TD = torch.randn(1, sum(SIZES), 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    own = [adapter(grouped, seed) for seed in range(len(SIZES))]
    with groups.through(list(zip(SIZES, own, strict=True)), CPU):
        got = layer_of(grouped)(x_1TD)
    pieces: dict[Part, list[torch.Tensor]] = {plain: [], exact: []}
    for piece, one in zip(torch.split(x_1TD, SIZES, dim=1), own, strict=True):
        for part, found in pieces.items():
            adapters.load_adapter(part, one)
            found.append(layer_of(part)(piece.double() if part is exact else piece))
    expected, truth = (torch.cat(found, dim=1) for found in pieces.values())
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    own_rounding = float((expected.double() - truth).abs().max())
    most = max(rounding, 2 * own_rounding) if dtype == torch.float32 else rounding
    torch.testing.assert_close(got, expected, rtol=rounding, atol=most)


@pytest.mark.parametrize("at_once", [False, True])
@torch.no_grad()
def test_each_segment_has_the_masks_of_its_key(folder: Path, at_once: bool) -> None:
    """Whoever shares the pass; a segment without a key keeps all, and so does a pass through the part's own adapter."""
    part = part_of(folder, dropout=0.5)
    groups, layer = group_adapters(part, at_once=at_once), layer_of(part)
    x_1TD = torch.randn(1, sum(SIZES), 32, generator=torch.Generator().manual_seed(1))
    own = [adapter(part, seed) for seed in range(len(SIZES))]
    pairs = list(zip(SIZES, own, strict=True))
    with groups.through(pairs, CPU, ["a", None, "b"]):
        together = layer(x_1TD)
    pieces = zip(torch.split(x_1TD, SIZES, dim=1), torch.split(together, SIZES, dim=1), strict=True)
    for (piece, got), pair, key in zip(pieces, pairs, ["a", None, "b"], strict=True):
        with groups.through([pair], CPU, [key]):
            alone = layer(piece)
        with groups.through([pair], CPU):
            kept = layer(piece)
        torch.testing.assert_close(alone, got, rtol=1e-5, atol=1e-5)
        assert torch.allclose(alone, kept) == (key is None)
    assert torch.equal(layer(x_1TD), layer(x_1TD))


def test_a_mask_follows_from_its_key_and_keeps_the_mean() -> None:
    first, again, other = (dropout_mask(key, (200, 50), 0.2, CPU) for key in ("x", "x", "y"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.unique().tolist()) == {0.0, 1.25}
    assert float(first.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(dropout_mask(None, (2, 3), 0.2, CPU), torch.ones(2, 3))


@torch.no_grad()
def test_without_segments_and_afterwards_the_parts_own_is_used(folder: Path) -> None:
    part, plain = part_of(folder), part_of(folder)
    groups = group_adapters(part)
    x_1TD = torch.ones(1, 2, 32)
    with groups.through([(2, adapter(part, 5))], CPU):
        assert not torch.allclose(layer_of(part)(x_1TD), layer_of(plain)(x_1TD))
    assert groups.segments is None
    torch.testing.assert_close(layer_of(part)(x_1TD), layer_of(plain)(x_1TD))


def test_segments_are_forgotten_even_if_the_pass_fails() -> None:
    groups = AdapterGroups(at_once=True)

    def failing() -> None:
        with groups.through([(1, {}), (2, {})], CPU):
            assert groups.padding is not None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert groups.segments is None
    assert groups.padding is None


def test_segments_that_are_not_all_tokens_are_refused(folder: Path) -> None:
    part = part_of(folder)
    groups = group_adapters(part)
    with groups.through([(1, adapter(part, 0))], CPU), pytest.raises(RuntimeError):
        layer_of(part)(torch.ones(1, 2, 32))
