"""Rules that believe changes with others near them: what Krum likes, and that far-off ones move nothing."""

from __future__ import annotations

import pytest
import torch

from isthmus.federation.strategies.neighbours import Bulyan, Krum, Mixed, MultiKrum
from isthmus.federation.strategies.rules import Mean

FAULTS = 1
NEAR = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1], [0.1, 0.1], [0.05, 0.05], [0.02, 0.08], [0.08, 0.02]])
FAR = torch.tensor([[1e6, -1e6]])
ALL = torch.cat([NEAR, FAR])
EQUAL = torch.full((len(ALL),), 1 / len(ALL), dtype=torch.float64)


def test_krum_takes_the_middle_one() -> None:
    assert Krum().combine(ALL, EQUAL, FAULTS).tolist() == pytest.approx([0.05, 0.05])


def test_multi_krum_means_all_but_the_remote() -> None:
    torch.testing.assert_close(MultiKrum().combine(ALL, EQUAL, FAULTS), NEAR.double().mean(0))


@pytest.mark.parametrize(
    "rule", [Krum(), MultiKrum(), Bulyan(), Mixed(MultiKrum())], ids=lambda rule: type(rule).__name__
)
def test_what_is_far_off_moves_the_result_nowhere_out_of_the_near(rule: Krum) -> None:
    found = rule.combine(ALL, EQUAL, FAULTS)
    assert found.dtype == torch.float64
    assert (found >= -1e-9).all()
    assert (found <= 0.1 + 1e-9).all()


def test_mixing_makes_unlike_changes_more_alike() -> None:
    spread = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    quarter = torch.full((4,), 0.25, dtype=torch.float64)
    mixed = Mixed(Mean()).combine(spread, quarter, 2)
    assert mixed.item() == pytest.approx(5.5), "of two pairs each change becomes the mean of its pair"


def test_weights_are_not_believed() -> None:
    claimed = torch.tensor([0.0] * len(NEAR) + [1.0], dtype=torch.float64)
    assert torch.equal(Krum().combine(ALL, claimed, FAULTS), Krum().combine(ALL, EQUAL, FAULTS))


def test_changes_that_are_no_rows_are_refused() -> None:
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        Krum().combine(torch.zeros(3), EQUAL[:3], FAULTS)
