"""Drafting ahead does not change what is sampled: two tokens follow the uncut model's exact distribution.

With ``top_k`` = 4 the next two tokens have 16 outcomes, whose probabilities are enumerated from the uncut model's
logits. Samples through the split model are held against them by Pearson's chi-square test. Seeds are fixed: a test
that passes, passes always.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import uncut
from tests.oracle.conftest import BuildTwins, Models
from tests.oracle.twins import Twins

Outcome = tuple[int, int]
Distribution = dict[Outcome, float]
WORDS = [84, 13, 90, 79, 83]
PROMPT = [*WORDS, *WORDS[:2]]
"""Looked up, its end drafts 90 and 79, both of which the model is about as likely to say as not to."""
TOP_K, TEMPERATURE = 4, 1.0
LENGTH = 3
"""One more than is looked at, so that the second token too may come from a draft."""
SAMPLES = 800
THRESHOLD = 1e-3
"""A right distribution falls below it once in a thousand choices of the seeds."""
REJECTED = 1e-6


def exact(model: PreTrainedModel, temperature: float = TEMPERATURE) -> Distribution:
    first = next_token(model, PROMPT, temperature)
    return {
        (one, other): p * q
        for one, p in first.items()
        for other, q in next_token(model, [*PROMPT, one], temperature).items()
    }


@torch.no_grad()
def next_token(model: PreTrainedModel, ids: list[int], temperature: float) -> dict[int, float]:
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    values, tokens = logits.topk(TOP_K)
    return dict(zip(tokens.tolist(), (values / temperature).softmax(dim=0).tolist(), strict=True))


def draw(model: PreTrainedModel, count: int = SAMPLES, **settings: Any) -> Counter[Outcome]:
    """Tokens by ``generate``; drafting does not go with several rows, so one answer at a time."""
    torch.manual_seed(17)
    found: Counter[Outcome] = Counter()
    for _ in range(count):
        ids = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            min_new_tokens=LENGTH,
            max_new_tokens=LENGTH,
            do_sample=True,
            top_k=TOP_K,
            temperature=TEMPERATURE,
            **settings,
        )
        one, other = ids[0, len(PROMPT) : len(PROMPT) + 2].tolist()
        found[one, other] += 1
    return found


def p_value(found: Counter[Outcome], expected: Distribution) -> float:
    """Of Pearson's chi-square test of goodness of fit; 0 if there is what cannot be."""
    if not found.keys() <= expected.keys():
        return 0.0
    total = found.total()
    assert min(expected.values()) * total >= 5, "the chi-square distribution is no approximation for rare outcomes"
    statistic = sum((found[one] - total * p) ** 2 / (total * p) for one, p in expected.items())
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def uncorrected(expected: Distribution, drafted: int) -> Distribution:
    """As if a refused first draft could be drawn again: the likeliest fault of speculative sampling."""
    accepted = sum(p for (one, _), p in expected.items() if one == drafted)
    return {outcome: p * ((1 - accepted) + (outcome[0] == drafted)) for outcome, p in expected.items()}


def helper(folder_of: Models, **config: Any) -> dict[str, Any]:
    """Settings that have this model draft three tokens each time, however sure it is."""
    model = uncut(folder_of("llama", **config))
    settings = model.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = 3, "constant"
    settings.assistant_confidence_threshold = 0.0
    return {"assistant_model": model}


WAYS: dict[str, Callable[[Models], dict[str, Any]]] = {
    "prompt-lookup": lambda models: {"prompt_lookup_num_tokens": 3},
    "assistant-base": lambda models: helper(models),
    "assistant-stranger": lambda models: helper(models, seed=5, blocks=2),
}


@pytest.fixture(scope="module")
def twins(build: BuildTwins) -> Iterator[Twins]:
    made = build("llama", (1, 1))
    yield made
    made.close()


@pytest.mark.parametrize("way", WAYS)
def test_drafts_do_not_change_the_distribution(way: str, twins: Twins, models: Models) -> None:
    releases = twins.boundary.ledger.releases
    before = len(releases)
    found = draw(twins.split, **WAYS[way](models))
    crossings = len(releases) - before
    assert SAMPLES < crossings < LENGTH * SAMPLES, "drafts were neither always nor never right"
    expected = exact(twins.whole)
    assert len(expected) == TOP_K**2
    assert p_value(found, expected) > THRESHOLD
    assert p_value(found, exact(twins.whole, temperature=2 * TEMPERATURE)) < REJECTED
    assert p_value(found, uncorrected(expected, PROMPT[2])) < REJECTED


def test_the_test_accepts_the_right_distribution_and_no_other(twins: Twins) -> None:
    """Exact draws of the same number, without any model between: the share of rejections is the threshold's."""
    expected = exact(twins.whole)
    outcomes, weights = list(expected), torch.tensor(list(expected.values()))
    generator = torch.Generator().manual_seed(1)
    values = []
    for _ in range(400):
        places = torch.multinomial(weights, SAMPLES, replacement=True, generator=generator)
        values.append(p_value(Counter(outcomes[place] for place in places.tolist()), expected))
    assert 0.02 <= sum(value < 0.05 for value in values) / len(values) <= 0.08
    assert p_value(Counter({(0, 0): 1}), expected) == 0.0
