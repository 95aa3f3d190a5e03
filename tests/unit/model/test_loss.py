"""The loss in pieces equals transformers' own, over all logits, with its gradients.

Shapes: B rows, K positions, D width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from isthmus.model import loss
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.crossing import IGNORED
from isthmus.model.cut import Cut, Part, load_part
from isthmus.model.families import FAMILIES
from isthmus.model.loss import loss_and_logits, loss_in_pieces
from tests.conftest import VOCABULARY, save_tiny_model

D = 8
SIZES = st.integers(1, 5)


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three positions at a time, however few there are."""
    monkeypatch.setattr(loss, "FEW", 0)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 3 * VOCABULARY)


def labels_of(rows: int, positions: int, share: float, vocabulary: int = VOCABULARY) -> torch.Tensor:
    targets_BK = torch.randint(0, vocabulary, (rows, positions))
    return targets_BK.masked_fill(torch.rand(rows, positions) >= share, IGNORED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(deadline=None, max_examples=60)
@given(
    rows=SIZES,
    positions=SIZES,
    vocabulary=st.integers(2, 40),
    size=SIZES,
    share=st.sampled_from([0.0, 0.5, 1.0]),
    divisor=st.sampled_from([None, 7, torch.tensor(3)]),
    scale=st.sampled_from([1.0, 0.25]),
)
def test_it_equals_the_whole(
    dtype: torch.dtype,
    rows: int,
    positions: int,
    vocabulary: int,
    size: int,
    share: float,
    divisor: Any,
    scale: float,
) -> None:
    torch.manual_seed(rows + 10 * positions)
    head = nn.Linear(D, vocabulary).to(dtype)
    targets_BK = labels_of(rows, positions, share, vocabulary)
    h_BKD = torch.randn(rows, positions, D, dtype=dtype, requires_grad=True)
    whole = ForCausalLMLoss(
        head(h_BKD), None, vocabulary, num_items_in_batch=divisor, shift_labels=targets_BK, ignore_index=IGNORED
    )
    wanted = (h_BKD, *head.parameters())
    expected = torch.autograd.grad(whole * scale, wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LOGITS_AT_ONCE", size * vocabulary)
        found = loss_in_pieces(head, head.parameters(), h_BKD, targets_BK, vocabulary=vocabulary, divisor=divisor)
        gradients = torch.autograd.grad(found * scale, wanted)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found, whole, rtol=tolerance, atol=tolerance, equal_nan=True)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_the_familys_own(family: str, tmp_path: Path) -> None:
    """Bit for bit, with whatever a family does behind its head."""
    top = top_of(family, tmp_path)
    inputs = inputs_of(top)
    expected = top.model(**inputs).logits
    assert torch.equal(top.logits(top.hidden(**inputs)), expected)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("keep", [0, 4, torch.tensor([1, 5, 6])], ids=["all", "last", "some"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere2", "qwen3_moe"])
def test_a_top_computes_its_loss_alone(family: str, shifted: bool, keep: Any, tmp_path: Path) -> None:
    top = top_of(family, tmp_path)
    inputs = inputs_of(top)
    kept = 7 if isinstance(keep, int) and not keep else 4 if isinstance(keep, int) else len(keep)
    head = {"labels": labels_of(2, kept, 0.8), "logits_to_keep": keep}
    if shifted:
        head["shift_labels"] = head["labels"]
    whole, logits = loss_and_logits(top, inputs, head)
    alone, none = loss_and_logits(top, inputs, {**head, "skip_logits": True})
    assert (logits is None, none) == (False, None)
    assert whole is not None
    assert alone is not None
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-6)
    pair = [torch.autograd.grad(one, inputs["inputs_embeds"])[0] for one in (alone, whole)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("in_pieces")
def test_no_piece_is_larger_and_prompts_have_no_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top, seen = top_of("llama", tmp_path), []
    logits = Part.logits
    monkeypatch.setattr(Part, "logits", lambda part, h_BLD: seen.append(h_BLD.shape[1]) or logits(part, h_BLD))
    labels_BK = torch.full((2, 7), IGNORED)
    labels_BK[0, 2:], labels_BK[1, 5:] = 5, 9
    head = {"labels": labels_BK, "shift_labels": labels_BK, "skip_logits": True}
    loss_and_logits(top, inputs_of(top), head)
    assert seen == [3, 3, 1]


def top_of(family: str, folder: Path) -> Part:
    return load_part(Checkpoint(str(save_tiny_model(family, folder))), Cut(1, 2), "top")


def inputs_of(top: Part) -> dict[str, Any]:
    h_BLD = torch.randn(2, 7, top.config.get_text_config().hidden_size, requires_grad=True)
    positions_BL = torch.arange(7).expand(2, 7)
    mask_BL = torch.ones(2, 7, dtype=torch.long)
    return {"inputs_embeds": h_BLD, "attention_mask": mask_BL, "position_ids": positions_BL, "use_cache": False}
