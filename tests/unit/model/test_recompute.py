"""Hidden states whose activations are computed again: the same, with the same gradients, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.model import recompute
from isthmus.model.adapters import add_adapter
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.model.recompute import hidden_recomputed, return_large_tensors
from isthmus.recipe import LoraSection
from tests.conftest import save_tiny_model
from tests.oracle.twins import FAMILIES

ROWS, LENGTH = 5, 9


def bottom_of(family: str, folder: Path, **lora: Any) -> Part:
    bottom = load_part(Checkpoint(str(save_tiny_model(family, folder, initializer_range=0.3))), Cut(2, 1), "bottom")
    targets = ("qkv_proj",) if family == "phi3" else ("q_proj", "v_proj")
    add_adapter(bottom, LoraSection(targets=targets, **lora), 0, freeze_a=False)
    return bottom


def inputs_of() -> dict[str, Any]:
    mask_BL = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask_BL[1, :4] = 0
    positions_BL = (mask_BL.cumsum(dim=1) - 1).clamp_min(0)
    ids_BL = torch.randint(4, 40, (ROWS, LENGTH))
    return {"input_ids": ids_BL, "attention_mask": mask_BL, "position_ids": positions_BL, "use_cache": False}


def gradients(part: Part, h_BLD: torch.Tensor) -> list[torch.Tensor]:
    trained = [one for one in part.parameters() if one.requires_grad]
    return list(torch.autograd.grad((h_BLD * torch.linspace(0, 1, h_BLD.numel()).view_as(h_BLD)).sum(), trained))


@pytest.mark.parametrize("tokens", [1, 2 * LENGTH, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_equal_those_of_one_pass(
    family: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "TOKENS_AT_ONCE", tokens)
    bottom, inputs = bottom_of(family, tmp_path), inputs_of()
    expected, found = bottom.hidden(**inputs), hidden_recomputed(bottom, inputs)
    real_BL = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real_BL], expected[real_BL], rtol=1e-4, atol=1e-4)
    expected, found = (one * real_BL.unsqueeze(-1) for one in (expected, found))
    for pair in zip(gradients(bottom, found), gradients(bottom, expected), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-3)


def test_positions_may_be_one_row_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "TOKENS_AT_ONCE", 2 * LENGTH)
    bottom, inputs = bottom_of("llama", tmp_path), inputs_of()
    inputs |= {"attention_mask": None, "position_ids": torch.arange(LENGTH).unsqueeze(0)}
    torch.testing.assert_close(hidden_recomputed(bottom, inputs), bottom.hidden(**inputs), rtol=1e-4, atol=1e-4)


def test_the_backward_has_the_dropout_of_the_forward(tmp_path: Path) -> None:
    """One piece draws as one pass does."""
    bottom, inputs = bottom_of("llama", tmp_path, dropout=0.5).train(), inputs_of()
    torch.manual_seed(3)
    expected = gradients(bottom, bottom.hidden(**inputs))
    torch.manual_seed(3)
    found = hidden_recomputed(bottom, inputs)
    torch.manual_seed(4)
    for pair in zip(gradients(bottom, found), expected, strict=True):
        torch.testing.assert_close(*pair)


def test_the_graph_keeps_fewer_numbers(tmp_path: Path) -> None:
    bottom, inputs = bottom_of("llama", tmp_path), inputs_of()
    kept = [_kept(lambda: bottom.hidden(**inputs)), _kept(lambda: hidden_recomputed(bottom, inputs))]
    assert kept[1] < kept[0] / 4


def test_large_tensors_may_go_back_at_once() -> None:
    return_large_tensors()
    assert torch.ones(2**22).sum() == 2**22


def _kept(forward: Any) -> int:
    """Numbers that a forward's graph keeps."""
    counts: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        counts.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(counts)
