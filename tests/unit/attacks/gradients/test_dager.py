"""Exact search on tiny models: all tokens while the rank suffices; what a frozen A, noise and optimizers leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus.attacks.gradients.dager import ExactSearch, GradientSpan
from isthmus.errors import DataError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.recipe import LoraSection
from tests.conftest import targets_of
from tests.oracle.twins import random_b, save_vivid_model

TEXTS = [[5, 60, 17, 33, 8, 90], [71, 12, 40, 17, 22]]
TOLD = [text[:-1] for text in TEXTS]
"""The last token has no loss after it and leaves no trace."""
Tensors = dict[str, torch.Tensor]


class Silo:
    """A model with adapters, whose gradients are those of plain autograd."""

    def __init__(self, folder: Path, *, rank: int, freeze_a: bool, moved: bool, family: str = "llama") -> None:
        checkpoint = Checkpoint(str(folder))
        cut = Cut(2, 1)
        self.bottom = load_part(checkpoint, cut, "bottom")
        self.rest = [load_part(checkpoint, cut, "trunk"), load_part(checkpoint, cut, "top", tied=self.bottom)]
        lora = LoraSection(rank=rank, targets=tuple(targets_of(family)))
        adapters.add_adapter(self.bottom, lora, 0, freeze_a=freeze_a)
        if moved:
            adapters.load_adapter(self.bottom, random_b(adapters.adapter_of(self.bottom)))

    def gradient(self, texts: list[list[int]]) -> Tensors:
        own = adapters.trainable(self.bottom)
        loss = torch.stack([self._loss(text) for text in texts]).mean()
        return dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))

    def update(self, texts: list[list[int]], optimizer: str, steps: int) -> Tensors:
        """New minus old, as a silo sends it; the adapter is put back."""
        before = adapters.adapter_of(self.bottom)
        own = adapters.trainable(self.bottom)
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        stepping = kinds[optimizer](list(own.values()), lr=1e-2)
        for _ in range(steps):
            for parameter, gradient in zip(own.values(), self.gradient(texts).values(), strict=True):
                parameter.grad = gradient
            stepping.step()
        change = {name: own[name].detach() - before[name] for name in own}
        adapters.load_adapter(self.bottom, before)
        return change

    def _loss(self, text: list[int]) -> torch.Tensor:
        h_1LD = self.bottom.hidden(input_ids=torch.tensor([text]), use_cache=False)
        g_1LD = self.rest[0].hidden(inputs_embeds=h_1LD, use_cache=False)
        logits_LV = self.rest[1].model(inputs_embeds=g_1LD, use_cache=False).logits[0]
        return nn.functional.cross_entropy(logits_LV[:-1], torch.tensor(text[1:]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vivid_model("llama", tmp_path_factory.mktemp("dager"))


def distinct(texts: list[list[int]]) -> set[int]:
    return {token for text in texts for token in text}


def test_all_texts_of_a_batch_are_read_out_of_a_gradient_of_enough_rank(folder: Path) -> None:
    silo = Silo(folder, rank=16, freeze_a=False, moved=True)
    search = ExactSearch(silo.bottom, silo.gradient(TEXTS))
    assert search.obstacles() == []
    assert set(search.tokens()) == distinct(TOLD)
    assert sorted(search.sequences(longest=8)) == sorted(TOLD)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma2"])
def test_other_families_too(tmp_path: Path, family: str) -> None:
    silo = Silo(save_vivid_model(family, tmp_path), rank=16, freeze_a=False, moved=True, family=family)
    search = ExactSearch(silo.bottom, silo.gradient(TEXTS))
    assert distinct(TOLD) <= set(search.tokens())
    assert all(text in search.sequences(longest=6) for text in TOLD)


def test_frozen_a_of_enough_rank_protects_nothing(folder: Path) -> None:
    silo = Silo(folder, rank=16, freeze_a=True, moved=False)
    search = ExactSearch(silo.bottom, silo.gradient(TEXTS))
    assert search.obstacles() == []
    assert set(search.tokens()) == distinct(TOLD)
    assert sorted(search.sequences(longest=8)) == sorted(TOLD)


def test_frozen_a_of_small_rank_tells_few_tokens_only(folder: Path) -> None:
    silo = Silo(folder, rank=4, freeze_a=True, moved=False)
    few, many = (ExactSearch(silo.bottom, silo.gradient(texts)) for texts in ([[5, 60, 17]], TEXTS))
    assert set(few.tokens()) == {5, 60}
    assert few.sequences(longest=4) == [[5, 60]]
    assert many.tokens() == []
    assert "full rank" in many.obstacles()[0]
    assert many.sequences(longest=4) == []


def test_as_many_tokens_as_a_has_rows_still_fit_and_one_more_does_not(folder: Path) -> None:
    silo = Silo(folder, rank=5, freeze_a=False, moved=True)
    fits, full = (silo.gradient([TEXTS[0]]), silo.gradient([[*TEXTS[0], 31]]))
    only_a = [{name: tensor for name, tensor in one.items() if "lora_A" in name} for one in (fits, full)]
    assert set(ExactSearch(silo.bottom, only_a[0]).tokens()) == distinct(TOLD[:1])
    search = ExactSearch(silo.bottom, only_a[1])
    assert not distinct(TEXTS[:1]) <= set(search.tokens())
    assert "A has full rank" in search.obstacles()[0]


def test_a_tells_nothing_while_b_is_zero(folder: Path) -> None:
    silo = Silo(folder, rank=16, freeze_a=False, moved=False)
    only_a = {name: tensor for name, tensor in silo.gradient(TEXTS).items() if "lora_A" in name}
    search = ExactSearch(silo.bottom, only_a)
    assert "zero" in search.obstacles()[0]
    assert search.tokens() == []
    assert bool((search.distances() == 1).all())


def test_an_update_of_one_step_of_sgd_is_as_good_as_the_gradient(folder: Path) -> None:
    silo = Silo(folder, rank=16, freeze_a=True, moved=False)
    search = ExactSearch(silo.bottom, silo.update(TEXTS, "sgd", 1))
    assert sorted(search.sequences(longest=8)) == sorted(TOLD)
    several = ExactSearch(silo.bottom, silo.update(TEXTS, "sgd", 3))
    assert set(several.tokens()) == distinct(TOLD)  # the first block's inputs do not move as the adapter trains
    assert "3 steps" in several.obstacles(steps=3)[0]


def test_adamw_s_update_spans_something_else(folder: Path) -> None:
    silo = Silo(folder, rank=16, freeze_a=True, moved=False)
    search = ExactSearch(silo.bottom, silo.update(TEXTS, "adamw", 1))
    assert search.tokens() == []
    assert "adamw" in search.obstacles(optimizer="adamw")[0]
    assert search.sequences(longest=8) == []


def test_noise_is_told_from_signal_until_it_drowns_it(folder: Path) -> None:
    silo = Silo(folder, rank=16, freeze_a=True, moved=False)
    gradient = silo.gradient(TEXTS)
    size = max(float(tensor.abs().max()) for tensor in gradient.values())
    right = []
    for share in (1e-6, 1e-1, 10):
        draw = torch.Generator().manual_seed(3)
        noised = {name: one + share * size * torch.randn(one.shape, generator=draw) for name, one in gradient.items()}
        search = ExactSearch(silo.bottom, noised, noise=share * size, tolerance=0.05)
        found = search.tokens(len(distinct(TOLD)))
        right.append(len(set(found) & distinct(TOLD)) / len(distinct(TOLD)))
    assert right[0] == 1.0
    assert right[2] < 0.4


def test_gradients_of_other_layers_are_refused(folder: Path) -> None:
    silo = Silo(folder, rank=4, freeze_a=True, moved=False)
    with pytest.raises(DataError, match="first block"):
        ExactSearch(silo.bottom, {"model.layers.1.self_attn.q_proj.lora_B.weight": torch.ones(32, 4)})


@given(rank=st.integers(1, 6), count=st.integers(1, 8), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_distance_is_that_of_least_squares(rank: int, count: int, seed: int) -> None:
    """Oracle: what remains of an input after the best combination of the span's rows is taken away."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, 10, generator=draw, dtype=torch.float64)
    x_ND = torch.randn(count, 10, generator=draw, dtype=torch.float64)
    span = GradientSpan(0, "q", torch.linalg.qr(rows.T).Q, None, 10)
    left = x_ND.T - rows.T @ torch.linalg.lstsq(rows.T, x_ND.T).solution
    assert torch.allclose(span.distance(x_ND), left.norm(dim=0) / x_ND.norm(dim=1), atol=1e-8)
