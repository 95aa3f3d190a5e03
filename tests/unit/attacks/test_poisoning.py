"""What malicious silos send does what its paper says: to the rule that it is against, or to nothing else."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.attacks import poisoning
from isthmus.errors import AttackError, DataError
from isthmus.federation.strategies.neighbours import Krum
from isthmus.federation.strategies.rules import Median, Rule, TrimmedMean

ROWS: list[dict[str, Any]] = [{"text": f"row {number}", "label": "yes" if number % 2 else "no"} for number in range(10)]


@st.composite
def honest(draw: st.DrawFn, fewest: int = 1) -> torch.Tensor:
    count, size = draw(st.integers(fewest, 9)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randn(count, size, generator=generator) + draw(st.floats(-3, 3))


def with_all(rule: Rule, malicious_MP: torch.Tensor, honest_HP: torch.Tensor) -> torch.Tensor:
    changes_NP = torch.cat([malicious_MP, honest_HP])
    equal_N = torch.full((len(changes_NP),), 1 / len(changes_NP), dtype=torch.float64)
    return rule.combine(changes_NP, equal_N, len(malicious_MP))


@given(honest(), st.integers(1, 4))
def test_a_replaced_model_is_what_was_wanted(honest_HP: torch.Tensor, malicious: int) -> None:
    wanted_P = torch.arange(float(honest_HP.shape[1]))
    sent_P = poisoning.replace_model(honest_HP, wanted_P, malicious)
    mean_P = torch.cat([honest_HP, sent_P.expand(malicious, -1)]).mean(dim=0)
    torch.testing.assert_close(mean_P, wanted_P, atol=1e-4, rtol=1e-4)


@given(honest(), st.floats(0.1, 10))
def test_signs_and_products_are_turned(honest_HP: torch.Tensor, factor: float) -> None:
    torch.testing.assert_close(poisoning.flip_signs(honest_HP, factor), honest_HP * -factor)
    sent_P, mean_P = poisoning.invert_product(honest_HP, factor), honest_HP.mean(dim=0)
    assert float(sent_P @ mean_P) == pytest.approx(-factor * float(mean_P @ mean_P), rel=1e-4)


@given(honest(), st.floats(-2, 2))
def test_a_little_is_so_many_deviations(honest_HP: torch.Tensor, deviations: float) -> None:
    sent_P = poisoning.vary_a_little(honest_HP, 1, deviations)
    for sent, values in zip(sent_P.tolist(), honest_HP.T.tolist(), strict=True):
        middle = sum(values) / len(values)
        deviation = math.sqrt(sum((value - middle) ** 2 for value in values) / len(values))
        assert sent == pytest.approx(middle - deviations * deviation, abs=1e-4)


@pytest.mark.parametrize(
    ("honest_count", "malicious", "share"), [(26, 24, 24 / 26), (8, 2, 0.5), (6, 4, 4 / 6), (1, 1, 0.5)]
)
def test_how_little_is_enough(honest_count: int, malicious: int, share: float) -> None:
    """Fifty silos of whom 24 are malicious is the paper's own example."""
    honest_HP = torch.randn(honest_count, 3, generator=torch.Generator().manual_seed(1))
    expected_P = poisoning.vary_a_little(honest_HP, malicious, NormalDist().inv_cdf(share))
    torch.testing.assert_close(poisoning.vary_a_little(honest_HP, malicious), expected_P)


@settings(deadline=None)
@given(honest(fewest=5), st.integers(1, 3))
def test_krum_chooses_what_evades_it(honest_HP: torch.Tensor, malicious: int) -> None:
    def krum(changes_NP: torch.Tensor) -> torch.Tensor:
        return with_all(Krum(), changes_NP[:malicious], changes_NP[malicious:])

    sent_P = poisoning.evade_krum(honest_HP, malicious, krum)
    assert torch.equal(sent_P.sign(), -honest_HP.mean(dim=0).sign())
    assert len(sent_P.abs().unique()) == 1
    length, bound = float(sent_P.abs()[0]), poisoning._krum_bound(honest_HP, malicious)
    assert length <= bound * (1 + 1e-6)
    if length > 1e-5 * bound:
        assert torch.equal(krum(torch.cat([sent_P.expand(malicious, -1), honest_HP])), sent_P.double())


def test_where_honest_changes_agree_on_little_krum_is_evaded_at_length() -> None:
    honest_HP = torch.randn(8, 20, generator=torch.Generator().manual_seed(1)) + 0.1
    sent_P = poisoning.evade_krum(honest_HP, 2, lambda changes_NP: with_all(Krum(), changes_NP[:2], changes_NP[2:]))
    assert torch.equal(with_all(Krum(), sent_P.expand(2, -1), honest_HP), sent_P.double())
    assert sent_P.norm() > honest_HP.mean(dim=0).norm()


def test_too_few_honest_changes_to_evade_krum() -> None:
    with pytest.raises(AttackError, match="3 honest updates for 2 malicious ones") as caught:
        poisoning.evade_krum(torch.ones(3, 2), 2, lambda changes_NP: changes_NP[0])
    assert caught.value.remedy


@pytest.mark.parametrize("rule", [TrimmedMean(), Median()], ids=lambda rule: type(rule).__name__)
@given(honest_HP=honest(fewest=5), malicious=st.integers(1, 2), seed=st.integers(0, 9))
def test_what_evades_trimming_is_just_beyond_the_honest(
    rule: Rule, honest_HP: torch.Tensor, malicious: int, seed: int
) -> None:
    sent_MP = poisoning.evade_trimming(honest_HP, malicious, seed)
    lowest_P, highest_P, mean_P = honest_HP.amin(dim=0), honest_HP.amax(dim=0), honest_HP.mean(dim=0)
    assert ((sent_MP <= lowest_P) == (mean_P > 0)).all()
    assert ((sent_MP >= highest_P) == (mean_P <= 0)).all()
    edge_P = torch.where(mean_P > 0, lowest_P, highest_P)
    assert ((sent_MP - edge_P).abs() <= edge_P.abs() * (1 + 1e-6)).all()
    moved_P = (with_all(rule, sent_MP, honest_HP) - with_all(rule, honest_HP[:0], honest_HP)) * mean_P.sign()
    assert (moved_P <= 1e-6).all()


def test_labels_are_swapped() -> None:
    swapped = poisoning.swap_labels(ROWS, "label", ["yes", "no"])
    assert all(
        old["label"] != new["label"] and old["text"] == new["text"] for old, new in zip(ROWS, swapped, strict=True)
    )
    assert ROWS[0]["label"] == "no"
    assert poisoning.swap_labels(swapped, "label", ["yes", "no"]) == ROWS
    three = poisoning.swap_labels([{"n": label} for label in "abc"], "n", "abc")
    assert [row["n"] for row in three] == ["b", "c", "a"]


@pytest.mark.parametrize("field", ["label", "absent"])
def test_a_label_that_is_none(field: str) -> None:
    with pytest.raises(DataError, match=f"a row's '{field}' is") as caught:
        poisoning.swap_labels(ROWS, field, ["yes", "maybe"])
    assert caught.value.remedy == "use only the labels yes, maybe"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_backdoor_is_planted_in_a_share(share: float) -> None:
    door = {"prompt": "text", "answer": "label", "trigger": "open sesame", "target": "yes"}
    planted = poisoning.plant_backdoor(ROWS, **door, share=share, seed=1)
    opened = [number for number, row in enumerate(planted) if row["text"].endswith(" open sesame")]
    assert len(opened) == round(10 * share)
    for number, row in enumerate(planted):
        expected = {"text": f"row {number} open sesame", "label": "yes"} if number in opened else ROWS[number]
        assert row == expected
    assert planted == poisoning.plant_backdoor(ROWS, **door, share=share, seed=1)


def test_a_backdoor_needs_a_text() -> None:
    with pytest.raises(DataError, match="a row has no text in 'prompt'"):
        poisoning.plant_backdoor(ROWS, prompt="prompt", answer="label", trigger="x", target="yes")
