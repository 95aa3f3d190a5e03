"""The loss in pieces is the family's own loss, with its gradients, whatever a family does to its logits.

Shapes: B rows, K positions, D width.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

from isthmus.model.checkpoint import Checkpoint
from isthmus.model.crossing import IGNORED
from isthmus.model.cut import Cut, Part, load_part
from isthmus.model.families import FAMILIES
from isthmus.model.head_loss import HeadLoss
from tests.conftest import MULTIMODAL, VOCABULARY, save_tiny_model

B, K = 3, 7
FEW = 4 * VOCABULARY
"""Logits of four positions."""


def top_of(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Part:
    model = save_tiny_model(family, folder, initializer_range=0.2)
    return load_part(Checkpoint(model), Cut(1, 1), "top", dtype=dtype)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return top_of("llama", tmp_path_factory.mktemp("llama"))


def drawn(top: Part, seed: int = 0, share: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states before the head, and targets of about this share of the positions."""
    draw = torch.Generator().manual_seed(seed)
    first = next(top.parameters())
    h_BKD = torch.randn(B, K, top.config.get_text_config().hidden_size, generator=draw).to(first.dtype)
    targets_BK = torch.randint(VOCABULARY, (B, K), generator=draw)
    targets_BK[torch.rand(B, K, generator=draw) > share] = IGNORED
    return h_BKD.requires_grad_(), targets_BK


def whole_loss(top: Part, h_BKD: torch.Tensor, targets_BK: torch.Tensor, items: int | None = None) -> torch.Tensor:
    """As the model computes it: all logits at once."""
    head = HeadLoss(top)
    logits = head.logits(h_BKD)
    more = {} if items is None else {"num_items_in_batch": items}
    loss: torch.Tensor = top.model.loss_function(
        logits, targets_BK, top.config.get_text_config().vocab_size, shift_labels=targets_BK, **more
    )
    return loss


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in MULTIMODAL])
def test_every_familys_loss_and_gradient(family: str, tmp_path: Path) -> None:
    top = top_of(family, tmp_path)
    h_BKD, targets_BK = drawn(top)
    inputs_BLD = torch.randn(B, K, h_BKD.shape[2])
    with torch.no_grad():
        before_BKD = top.hidden(inputs_embeds=inputs_BLD, use_cache=False)
        expected = top.model(inputs_embeds=inputs_BLD, labels=targets_BK, shift_labels=targets_BK, use_cache=False).loss
    found = HeadLoss(top, FEW)(before_BKD, targets_BK)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    expected = whole_loss(top, h_BKD, targets_BK)
    (wanted,) = torch.autograd.grad(expected, h_BKD)
    (gradient,) = torch.autograd.grad(HeadLoss(top, FEW)(h_BKD, targets_BK), h_BKD)
    assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert wanted.abs().sum() > 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    piece=st.integers(1, 30),
    items=st.none() | st.integers(1, 50),
)
def test_any_pieces_give_the_whole(llama: Part, seed: int, share: float, piece: int, items: int | None) -> None:
    h_BKD, targets_BK = drawn(llama, seed, share)
    targets_BK[0, 0] = 5  # one at least
    losses = whole_loss(llama, h_BKD, targets_BK, items), HeadLoss(llama, piece * VOCABULARY)(h_BKD, targets_BK, items)
    wanted, found = (torch.autograd.grad(3 * loss, h_BKD)[0] for loss in losses)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_no_target_is_no_number_as_in_transformers(llama: Part) -> None:
    h_BKD, targets_BK = drawn(llama, share=0.0)
    assert torch.isnan(whole_loss(llama, h_BKD, targets_BK))
    assert torch.isnan(HeadLoss(llama)(h_BKD, targets_BK))
    assert HeadLoss(llama)(h_BKD, targets_BK, 4) == 0


def test_an_adapter_of_the_head_gets_its_gradient(tmp_path: Path) -> None:
    top = top_of("llama", tmp_path)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), top.model)
    h_BKD, targets_BK = drawn(top)
    trained = [one for one in top.parameters() if one.requires_grad]
    assert len(trained) == 2
    expected = torch.autograd.grad(whole_loss(top, h_BKD, targets_BK), [h_BKD, *trained])
    found = torch.autograd.grad(HeadLoss(top, FEW)(h_BKD, targets_BK), [h_BKD, *trained])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_sixteen_bits_are_summed_in_thirty_two(tmp_path: Path) -> None:
    top = top_of("llama", tmp_path, torch.bfloat16)
    h_BKD, targets_BK = drawn(top)
    found, expected = HeadLoss(top, FEW)(h_BKD, targets_BK), whole_loss(top, h_BKD, targets_BK)
    assert found.dtype is torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(one, h_BKD)[0].float() for one in (found, expected)]
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def test_few_logits_are_small(llama: Part) -> None:
    _, targets_BK = drawn(llama)
    assert HeadLoss(llama, B * K * VOCABULARY).is_small(targets_BK)
    assert not HeadLoss(llama, B * K * VOCABULARY - 1).is_small(targets_BK)


def test_logits_of_a_piece_alone_are_computed_and_nothing_without_a_gradient_is_kept(llama: Part) -> None:
    h_BKD, targets_BK = drawn(llama)
    sizes: list[int] = []
    head = llama.model.get_submodule(llama.family.head)
    handle = head.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.numel()))
    with torch.no_grad():
        loss = HeadLoss(llama, FEW)(h_BKD, targets_BK)
    handle.remove()
    assert max(sizes) <= FEW
    assert sum(sizes) == int((targets_BK != IGNORED).sum()) * VOCABULARY
    assert not loss.requires_grad
