"""The choice of a token."""

from __future__ import annotations

import math
from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from isthmus.gateway.sampling import SamplingSettings, TokenChooser

LOGITS = torch.tensor([1.0, 3.0, 2.0, 2.9, -1.0])
GREEDY = SamplingSettings(temperature=0.0)


def tokens(chooser: TokenChooser, count: int = 200) -> list[int]:
    return [chooser.choose([], [], LOGITS).token for _ in range(count)]


def test_temperature_zero_is_the_likeliest() -> None:
    assert tokens(TokenChooser(GREEDY), 3) == [1, 1, 1]


@given(st.floats(0, 1e-3))
def test_cold_is_the_likeliest(temperature: float) -> None:
    assert tokens(TokenChooser(SamplingSettings(temperature, seed=1)), 5) == [1] * 5


def test_draws_follow_the_distribution() -> None:
    found = Counter(tokens(TokenChooser(SamplingSettings(temperature=0.5, seed=1)), 4000))
    expected = (LOGITS / 0.5).softmax(dim=0)
    assert all(abs(found[token] / 4000 - float(expected[token])) < 0.03 for token in range(5))


def test_top_p_keeps_the_smallest_set() -> None:
    assert set(tokens(TokenChooser(SamplingSettings(top_p=0.6, seed=1)))) == {1, 3}
    assert set(tokens(TokenChooser(SamplingSettings(top_p=0.0, seed=1)))) == {1}


def test_a_seed_decides_and_answers_have_seeds_of_their_own() -> None:
    def drawn(seed: int | None, answer: int = 0) -> list[int]:
        return tokens(TokenChooser(SamplingSettings(seed=seed), answer=answer))

    assert drawn(4) == drawn(4)
    assert drawn(4, 2) == drawn(4, 2)
    assert len({tuple(one) for one in (drawn(4), drawn(5), drawn(4, 1), drawn(4, 2), drawn(None), drawn(None))}) == 6
    assert drawn(-(2**63)) != drawn(2**63 - 1)


@given(st.lists(st.integers(0, 4), max_size=6), st.floats(-2, 2), st.floats(-2, 2), st.floats(-100, 100))
def test_penalties_and_biases_by_openais_formula(
    answer: list[int], presence: float, frequency: float, bias: float
) -> None:
    settings = SamplingSettings(0.0, presence_penalty=presence, frequency_penalty=frequency, logit_bias={2: bias})
    expected = [
        float(logit) - answer.count(token) * frequency - (token in answer) * presence + (token == 2) * bias
        for token, logit in enumerate(LOGITS)
    ]
    chosen = TokenChooser(settings).choose([1, 1, 1], answer, LOGITS).token
    assert math.isclose(expected[chosen], max(expected), abs_tol=1e-4)
    assert torch.equal(LOGITS, torch.tensor([1.0, 3.0, 2.0, 2.9, -1.0]))


def test_the_models_own_settings_come_first() -> None:
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)])
    assert TokenChooser(GREEDY, processors).choose([1], [], LOGITS).token == 3
    assert TokenChooser(GREEDY, processors).choose([1], [3], LOGITS).token == 2


def test_log_probabilities_are_the_models_before_any_setting() -> None:
    scored = TokenChooser(SamplingSettings(0.0, logit_bias={4: 100}), likeliest=2).choose([], [], LOGITS)
    expected = LOGITS.log_softmax(dim=0)
    assert (scored.token, scored.log_prob) == (4, float(expected[4]))
    assert scored.best == ((1, float(expected[1])), (3, float(expected[3])))
    assert TokenChooser(GREEDY, likeliest=0).choose([], [], LOGITS).best == ()
    assert TokenChooser(GREEDY).choose([], [], LOGITS).log_prob == 0.0


class Only:
    """Allows these tokens, and is complete after one."""

    def __init__(self, *tokens: int) -> None:
        self._tokens, self.complete = tokens, False

    def allowed(self, size: int) -> torch.Tensor:
        return torch.isin(torch.arange(size), torch.tensor(self._tokens))

    def take(self, token: int) -> None:
        self.complete = True


def test_a_rule_leaves_out_tokens_after_biases_and_before_the_rest() -> None:
    settings = [GREEDY, SamplingSettings(top_p=0.0, logit_bias={1: 100}), SamplingSettings(2.0, logit_bias={2: -100})]
    assert [TokenChooser(one, rule=Only(2, 4)).choose([], [], LOGITS).token for one in settings] == [2, 2, 4]
    chooser = TokenChooser(GREEDY, likeliest=1, rule=Only(4))
    scored = chooser.choose([], [], LOGITS)
    assert (scored.token, scored.best[0][0], chooser.complete) == (4, 1, False)
    chooser.take(4)
    assert chooser.complete
    assert not TokenChooser(GREEDY).complete
