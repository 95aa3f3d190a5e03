"""Responses: read from the trunk's results, and solved from gradients, clean, clipped, noised and drowned."""

from __future__ import annotations

import random

import pytest
import torch

from isthmus.attacks.gradients.gradient_inversion import GradientDefence, GradientInverter, TokenProbe, logit_lens
from isthmus.attacks.gradients.lens import Lens
from isthmus.errors import DataError
from tests.oracle.twins import FAMILIES
from tests.unit.attacks.conftest import PartsOf
from tests.unit.attacks.victims import Parts, Seen, step

PROMPT = [9, 30, 22, 61, 30, 15, 77]
AT_S = torch.arange(6, 16)
WEIGHT = 20


def answers(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw.choices(range(4, 97), k=10) for _ in range(count)]


def share(parts: Parts, **how: float) -> float:
    """Of the tokens of three rows, those that the gradient gives away."""
    right = 0
    for number, answer in enumerate(answers(3, seed=0)):
        seen = step(parts, PROMPT, answer, weight=WEIGHT, seed=number, **how)  # type: ignore[arg-type]
        found = GradientInverter(parts.top, seen.g_LD, seen.e_LD, GradientDefence(WEIGHT, **how)).recover(AT_S)
        right += sum(one == two for one, two in zip(found.tolist(), answer, strict=True))
    return right / 30


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_gradients_give_every_token_away(parts_of: PartsOf, family: str) -> None:
    assert share(parts_of(family)) == 1.0


def test_clipping_alone_does_not_help(parts_of: PartsOf) -> None:
    assert share(parts_of("llama"), clip=0.01) >= 0.9


def test_noise_is_reckoned_with(parts_of: PartsOf) -> None:
    shares = [share(parts_of("llama"), clip=0.05, noise=noise) for noise in (1e-5, 1e-3, 0.3)]
    assert shares[0] >= 0.9
    assert shares == sorted(shares, reverse=True)
    assert shares[2] < 0.2


def test_the_answer_s_place_shows_in_clean_gradients(parts_of: PartsOf) -> None:
    for answer in answers(3, seed=7):
        seen = step(parts_of("llama"), PROMPT, answer, weight=WEIGHT)
        inverter = GradientInverter(parts_of("llama").top, seen.g_LD, seen.e_LD, GradientDefence(WEIGHT))
        assert inverter.supervised().tolist() == AT_S.tolist()
        assert inverter.recover().tolist() == answer


def test_solved_tokens_equal_an_exhaustive_search(parts_of: PartsOf) -> None:
    """Oracle: with one supervised position, every token's gradient is worked out and the nearest taken."""
    parts, at_S = parts_of("llama"), torch.tensor([6])
    for token in (4, 50, 96):
        seen = step(parts, PROMPT, [token], weight=1, noise=0.02, seed=token)
        lens = Lens(parts.top, seen.g_LD)
        fits = [float((lens.gradient(at_S, torch.tensor([v]), 1) - seen.e_LD).norm()) for v in range(97)]
        defence = GradientDefence(1, noise=0.02)
        inverter = GradientInverter(parts.top, seen.g_LD, seen.e_LD, defence, prior=0.0, shortlist=30)
        found = inverter.recover(at_S)
        assert int(found) == min(range(97), key=fits.__getitem__)


def test_greedy_responses_are_read_from_what_the_trunk_returns(parts_of: PartsOf) -> None:
    parts = parts_of("llama")
    ids = list(PROMPT)
    for _ in range(8):
        logits = parts.top.model(inputs_embeds=run(parts, ids).g_LD[None], use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    read = logit_lens(parts.top, run(parts, ids).g_LD, keep=3)
    assert read.shape == (len(ids), 3)
    assert read[len(PROMPT) - 1 : -1, 0].tolist() == ids[len(PROMPT) :]


def run(parts: Parts, ids: list[int]) -> Seen:
    return step(parts, ids[:-1], ids[-1:], weight=1)


def test_a_probe_learns_tokens_without_top_s_weights(parts_of: PartsOf) -> None:
    parts = parts_of("llama")

    def gradients(seed: int, count: int, noise: float) -> tuple[torch.Tensor, list[int]]:
        rows = [
            (answer[0], step(parts, PROMPT, answer[:1], weight=1, noise=noise, seed=n).e_LD[6])
            for n, answer in enumerate(answers(count, seed))
        ]
        return torch.stack([e_D for _, e_D in rows]), [token for token, _ in rows]

    head_VD = Lens(parts.top, torch.ones(1, 32)).head_VD
    for noise, low, high in ((0.0, 0.7, 1.0), (50.0, 0.0, 0.1)):
        mine, theirs = gradients(1, 200, noise), gradients(2, 60, noise)
        found = TokenProbe(*mine, head_VD).predict(theirs[0])
        right = sum(one == two for one, two in zip(found, theirs[1], strict=True)) / 60
        assert low <= right <= high


def test_gradients_of_another_sequence_are_refused(parts_of: PartsOf) -> None:
    with pytest.raises(DataError, match="same sequence"):
        GradientInverter(parts_of("llama").top, torch.ones(3, 32), torch.ones(4, 32), GradientDefence(1))


def test_a_known_ending_is_taken_for_granted(parts_of: PartsOf) -> None:
    parts, answer = parts_of("llama"), [*answers(1, seed=3)[0][:9], 2]
    seen = step(parts, PROMPT, answer, weight=WEIGHT)
    inverter = GradientInverter(parts.top, seen.g_LD, seen.e_LD, GradientDefence(WEIGHT), ending=2)
    assert inverter.recover(AT_S).tolist() == answer
    drowned = torch.randn(seen.e_LD.shape, generator=torch.Generator().manual_seed(0))
    told = GradientInverter(parts.top, seen.g_LD, drowned, GradientDefence(WEIGHT, noise=1.0), ending=2)
    assert int(told.recover(AT_S)[-1]) == 2
