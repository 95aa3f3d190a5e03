"""The search and the identification through channels that tell all, something and nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from isthmus.attacks.inversion.identification import identify_rows
from isthmus.attacks.inversion.likelihood import BoundaryLikelihood
from isthmus.attacks.inversion.sampler import SamplerSettings, WeightedText, consensus, invert_by_sampling
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import Crossing, KnownPair, TokenRow, View
from isthmus.errors import AttackError
from tests.conftest import VOCABULARY
from tests.unit.attacks.attacked import Attacked, random_rows

Text = tuple[int, ...]


def texts(count: int, seed: int, longest: int = 9) -> list[Text]:
    return [tuple(row.prompt) for row in random_rows(count, seed, longest)]


def ended(view: View, own: list[Text], yours: list[Text], *, last: int = 1, noise: float = 0.0) -> View:
    """These texts through a boundary that lets only the last positions pass."""
    bottom, draw = Knowledge(view), torch.Generator().manual_seed(3)

    def crossing(text: Text) -> Crossing:
        h_KE = bottom.bottom_of(text)[-last:]
        return Crossing("x", "train", 1, h_KE + noise * torch.randn(h_KE.shape, generator=draw))

    pairs = tuple(KnownPair(text, crossing(text)) for text in own)
    return replace(view, pairs=pairs, crossings=tuple(map(crossing, yours)))


def near(text: Text, seed: int) -> Text:
    """One token of it changed."""
    draw = torch.Generator().manual_seed(seed)
    place = int(torch.randint(len(text), (), generator=draw))
    token = int(torch.randint(4, VOCABULARY, (), generator=draw))
    return (*text[:place], token, *text[place + 1 :])


def test_a_clean_vector_tells_the_text_among_near_ones(attacked: Attacked) -> None:
    yours = texts(4, 5)
    own = [*(near(text, seed) for text in yours for seed in range(9)), *yours, *texts(40, 6)]
    assert invert_by_sampling(Knowledge(ended(attacked()[0], own, yours))) == [list(text) for text in yours]


def test_texts_that_the_pool_does_not_hold_are_found_from_near_ones(attacked: Attacked) -> None:
    yours = [(11, 29), (64, 40, 8), (70, 21, 55)]
    own = [*({near(text, seed) for text in yours for seed in range(6)} - set(yours)), *texts(30, 16, 5)]
    own.sort()
    view = ended(attacked()[0], own, yours)
    found = invert_by_sampling(Knowledge(view), SamplerSettings(steps=16, proposals=160))
    assert sum(list(text) == one for text, one in zip(yours, found, strict=True)) >= 2


def test_where_nothing_is_told_it_says_what_the_pool_does(attacked: Attacked) -> None:
    yours, own = texts(3, 5), texts(40, 6)
    found = invert_by_sampling(Knowledge(ended(attacked()[0], own, yours, noise=1e4)))
    guess = list(consensus([WeightedText(text, 1 / len(own)) for text in own]))
    for one in found:
        same = sum(said == best for said, best in zip(one, guess, strict=False))
        assert same >= len(guess) / 2
    assert found[0] == found[0][: max(map(len, own))]


def test_the_answer_is_the_one_of_which_most_is_expected_to_be_right() -> None:
    belief = [WeightedText((4, 5, 6), 0.4), WeightedText((7, 5, 9), 0.35), WeightedText((7, 8, 6), 0.25)]
    assert consensus(belief) == (7, 5, 6)
    assert consensus([WeightedText((1, 2, 3), 0.5), WeightedText((9, 1, 2, 3), 0.5)], from_end=True) == (9, 1, 2, 3)


def test_where_all_tokens_cross_it_points_to_matching(attacked: Attacked) -> None:
    with pytest.raises(AttackError, match="--attack matching"):
        invert_by_sampling(Knowledge(attacked()[0]))


def asked_of(view: View, yours: list[Text], others: list[Text]) -> View:
    return replace(view, candidates=tuple(TokenRow(text, (4,)) for text in [*others, *yours]))


@pytest.mark.parametrize("last", [1, 2])
def test_clean_vectors_identify_every_text(attacked: Attacked, last: int) -> None:
    yours, others = texts(8, 5), texts(92, 6)
    long = [text for text in yours if len(text) >= last]
    own = [text for text in texts(40, 7) if len(text) >= last]
    view = asked_of(ended(attacked()[0], own, long, last=last), long, others)
    ranked = identify_rows(Knowledge(view)).by_row
    assert [(*view.candidates[one[0]].prompt,) for one in ranked] == long


def test_noise_alone_identifies_no_text(attacked: Attacked) -> None:
    yours, others = texts(40, 5), texts(160, 6)
    view = asked_of(ended(attacked()[0], texts(40, 7), yours, noise=1e4), yours, others)
    ranked = identify_rows(Knowledge(view)).by_row
    first = sum(view.candidates[one[0]].prompt == text for one, text in zip(ranked, yours, strict=True))
    ten = sum(
        text in [view.candidates[number].prompt for number in one] for one, text in zip(ranked, yours, strict=True)
    )
    assert first <= 4
    assert ten <= 9


def test_without_candidates_nothing_is_identified(attacked: Attacked) -> None:
    with pytest.raises(AttackError, match="sees no candidates"):
        identify_rows(Knowledge(attacked()[0]))


def test_the_likelihood_is_the_gaussians_and_its_slope_the_derivative(attacked: Attacked) -> None:
    own = texts(40, 7)
    knowledge = Knowledge(ended(attacked()[0], own, own[:1], noise=0.5))
    channel = BoundaryLikelihood(knowledge)
    assert channel.variance == pytest.approx(0.25, rel=0.3)
    z_KD, (text, other) = knowledge.view.crossings[0].hidden_LD, own[:2]
    mean_NKD = channel.expected([text, other], 1)
    likelihood_N = channel.log_likelihood(mean_NKD, z_KD)
    normal = torch.distributions.Normal(mean_NKD, channel.variance**0.5)
    exact_N = normal.log_prob(z_KD).sum(dim=(1, 2))
    assert float(likelihood_N[0] - likelihood_N[1]) == pytest.approx(float(exact_N[0] - exact_N[1]), rel=1e-3)
    slope_LE = channel.slope(text, z_KD)
    assert slope_LE.shape == (len(text), knowledge.embedding.shape[1])
    assert float(slope_LE.abs().max()) > 0
