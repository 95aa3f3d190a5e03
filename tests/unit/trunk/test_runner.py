"""The runner: whole sequences and pieces of cached ones give the same, the residual is what the blocks add."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.errors import FrameError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.trunk.runner import Runner
from tests.conftest import save_tiny_model

LENGTHS = [3, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


def runner(folder: Path, *, residual: bool = False) -> Runner:
    return Runner(load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk"), residual=residual)


def hidden() -> torch.Tensor:
    return torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_pieces_of_cached_sequences_are_the_whole_ones(folder: Path) -> None:
    one = runner(folder)
    whole = one.full_pass(hidden(), LENGTHS)
    caches = [one.new_cache() for _ in LENGTHS]
    first, second = hidden().split(LENGTHS)
    got = [one.cached_pass(torch.cat([first[:1], second[:4]]), [1, 4], caches)]
    got.append(one.cached_pass(torch.cat([first[1:], second[4:]]), [2, 1], caches))
    together = torch.cat([got[0][:1], got[1][:2], got[0][1:], got[1][2:]])
    torch.testing.assert_close(together, whole, rtol=1e-5, atol=1e-5)
    assert [cache.length for cache in caches] == LENGTHS


@torch.no_grad()
def test_the_residual_is_what_the_blocks_add(folder: Path) -> None:
    added = runner(folder, residual=True).full_pass(hidden(), LENGTHS)
    torch.testing.assert_close(added + hidden(), runner(folder).full_pass(hidden(), LENGTHS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_sequence_sees_another(folder: Path) -> None:
    one, changed = runner(folder), hidden()
    changed[0] = 100.0
    same, other = one.full_pass(hidden(), LENGTHS).split(LENGTHS), one.full_pass(changed, LENGTHS).split(LENGTHS)
    assert torch.equal(same[1], other[1])
    assert not torch.allclose(same[0], other[0])


def test_longer_than_the_models_context_is_refused(folder: Path) -> None:
    one = runner(folder)
    one.check_context([one.context])
    with pytest.raises(FrameError, match="context is 512"):
        one.check_context([1, one.context + 1])
