"""Vocabulary matching against an exhaustive search, and through what may lie between bottom and the trunk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from isthmus.attacks.inversion.linear import LinearInverter, ridge
from isthmus.attacks.inversion.matching import MatchingSettings, match_vocabulary
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import Crossing, KnownPair, View
from isthmus.errors import AttackError
from tests.conftest import VOCABULARY
from tests.unit.attacks.attacked import Attacked


def exhaustively(knowledge: Knowledge) -> list[list[int]]:
    """The oracle: at each position all tokens, each row computed anew."""
    found = []
    for crossing in knowledge.view.crossings:
        row: list[int] = []
        for z_D in crossing.hidden_LD:
            ids_VL = torch.tensor([[*row, token] for token in range(VOCABULARY)])
            h_VE = knowledge.bottom.hidden(input_ids=ids_VL, use_cache=False)[:, -1]
            row.append(int((h_VE - z_D).square().sum(dim=1).argmin()))
        found.append(row)
    return found


def changed(view: View, matrix_DX: torch.Tensor, last: int | None = None) -> View:
    """The view through a boundary that multiplies by a matrix, and lets only the last positions pass."""

    def through(crossing: Crossing) -> Crossing:
        hidden_LD = crossing.hidden_LD if last is None else crossing.hidden_LD[-last:]
        return replace(crossing, hidden_LD=hidden_LD @ matrix_DX)

    pairs = tuple(KnownPair(pair.tokens, through(pair.crossing)) for pair in view.pairs)
    return replace(view, crossings=tuple(map(through, view.crossings)), pairs=pairs)


@pytest.mark.parametrize(
    "search",
    [MatchingSettings(), MatchingSettings(proposals=2, wider=(4,), whole=1000, group=3)],
    ids=["usual", "narrow"],
)
def test_without_noise_every_token_is_recovered(attacked: Attacked, search: MatchingSettings) -> None:
    view, truth = attacked()
    knowledge = Knowledge(view)
    assert match_vocabulary(knowledge, search) == exhaustively(knowledge) == truth


@pytest.mark.parametrize(
    "settings", [{"codec": "int8"}, {"noise": 0.3}, {"forward": {"clip": 1.0, "noise": 0.003}}], ids=str
)
def test_through_codec_noise_and_clipping(attacked: Attacked, settings: dict[str, object]) -> None:
    view, truth = attacked(**settings)
    assert match_vocabulary(Knowledge(view)) == truth


def test_through_a_narrow_map_that_nobody_told_it(attacked: Attacked) -> None:
    view, truth = attacked(own=200)
    draw = torch.Generator().manual_seed(5)
    assert match_vocabulary(Knowledge(changed(view, torch.randn(32, 24, generator=draw)))) == truth


def test_with_much_noise_the_language_model_is_asked(attacked: Attacked) -> None:
    view, truth = attacked(noise=3.0)
    found = match_vocabulary(Knowledge(view))
    assert [len(row) for row in found] == [len(row) for row in truth]
    right = sum(
        one == two for row, other in zip(found, truth, strict=True) for one, two in zip(row, other, strict=True)
    )
    assert right > 4 * sum(map(len, truth)) / VOCABULARY


def test_searches_through_the_whole_vocabulary_are_bounded(attacked: Attacked) -> None:
    view, truth = attacked()
    found = match_vocabulary(Knowledge(view), MatchingSettings(proposals=2, wider=(4,), whole=3))
    assert found != truth
    assert [len(row) for row in found] == [len(row) for row in truth]


def test_where_only_the_ends_of_rows_cross_it_says_so(attacked: Attacked) -> None:
    view, _ = attacked()
    with pytest.raises(AttackError, match="not all tokens cross"):
        match_vocabulary(Knowledge(changed(view, torch.eye(32), last=1)))


def test_the_linear_inverter_is_as_good_as_bayes_rule_with_the_true_parameters() -> None:
    draw = torch.Generator().manual_seed(3)
    embedding_VE, map_ED = torch.randn(11, 5, generator=draw), torch.randn(5, 4, generator=draw)
    root_DD = torch.randn(4, 4, generator=draw)
    tokens_T = torch.randint(11, (6000,), generator=draw)
    mean_VD = embedding_VE @ map_ED
    z_TD = mean_VD[tokens_T] + torch.randn(6000, 4, generator=draw) @ root_DD
    truly = torch.distributions.MultivariateNormal(mean_VD, root_DD.T @ root_DD)
    best_T = truly.log_prob(z_TD[5000:, None]).argmax(dim=1)
    linear = LinearInverter.fit(z_TD[:5000], tokens_T[:5000], embedding_VE)
    found_T = linear.best(z_TD[5000:], 1)[:, 0]
    accuracy = [float((guess_T == tokens_T[5000:]).float().mean()) for guess_T in (found_T, best_T)]
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.03)
    assert 0.2 < accuracy[1] < 0.95
    assert float(linear.prior_V.exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_ridge_finds_an_affine_map() -> None:
    draw = torch.Generator().manual_seed(4)
    x, weight, bias = (
        torch.randn(50, 6, generator=draw),
        torch.randn(6, 3, generator=draw),
        torch.randn(3, generator=draw),
    )
    found, offset = ridge(x, x @ weight + bias, shrink=0.0)
    assert torch.allclose(found, weight, atol=1e-5)
    assert torch.allclose(offset, bias, atol=1e-5)


def test_too_little_to_learn_from_is_named() -> None:
    with pytest.raises(AttackError, match="1 tokens to learn from"):
        LinearInverter.fit(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), torch.zeros(5, 2))


def test_a_few_clean_numbers_of_every_token_are_enough(attacked: Attacked) -> None:
    view, truth = attacked(width=4, forward={"clip": 1.0, "noise": 0.0}, own=100)
    assert match_vocabulary(Knowledge(view)) == truth
