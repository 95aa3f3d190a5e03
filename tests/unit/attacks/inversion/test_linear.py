"""The linear inverter and its ridge regression against closed forms."""

from __future__ import annotations

import pytest
import torch

from isthmus.attacks.inversion.linear import LinearInverter, ridge
from isthmus.errors import AttackError

WORDS, WIDTH = 12, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ridge_finds_an_affine_map() -> None:
    x_TE, weight_ED, bias_D = draw(100, 5), draw(5, 3, seed=1), draw(3, seed=2)
    weight, bias = ridge(x_TE, x_TE @ weight_ED + bias_D)
    torch.testing.assert_close(weight, weight_ED, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(bias, bias_D, rtol=1e-2, atol=1e-2)


def test_tokens_are_read_from_noised_vectors_also_unseen_ones() -> None:
    embedding_VE = draw(WORDS, WIDTH)
    map_ED = draw(WIDTH, WIDTH, seed=1)
    tokens_T = torch.arange(300) % (WORDS - 1)
    z_TD = embedding_VE[tokens_T] @ map_ED + 0.1 * draw(300, WIDTH, seed=2)
    inverter = LinearInverter.fit(z_TD, tokens_T, embedding_VE)
    assert (inverter.best(z_TD, 1)[:, 0] == tokens_T).float().mean() > 0.95
    last_1D = embedding_VE[-1:] @ map_ED
    assert WORDS - 1 in inverter.best(last_1D, 3)[0].tolist()
    torch.testing.assert_close(inverter.scores(z_TD[:4])[:, [2, 5]], inverter.scores(z_TD[:4], torch.tensor([2, 5])))


def test_one_token_teaches_nothing() -> None:
    with pytest.raises(AttackError, match="1 tokens"):
        LinearInverter.fit(draw(1, WIDTH), torch.tensor([0]), draw(WORDS, WIDTH))
