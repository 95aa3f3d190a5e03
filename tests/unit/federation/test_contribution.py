"""Contributions as rows of numbers, and what they count for in proportion."""

from __future__ import annotations

import pytest
import torch

from isthmus.federation.contribution import Contribution, changes, proportions
from isthmus.updates.flat import Layout

LAYOUT = Layout({"x": (2,), "y": (1,)})


def contribution(name: str, weight: float, *values: float) -> Contribution:
    x, y, z = torch.tensor(values).split(1)
    return Contribution(name, weight, {"y": z, "x": torch.cat([x, y])})


def test_changes_are_rows_in_the_layouts_order() -> None:
    both = [contribution("a", 1.0, 1.0, 2.0, 3.0), contribution("b", 1.0, 4.0, 5.0, 6.0)]
    assert changes(both, LAYOUT).tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def test_proportions_sum_to_one_and_none_counts_for_more_than_the_most() -> None:
    both = [contribution("a", 1.0, 0, 0, 0), contribution("b", 9.0, 0, 0, 0)]
    assert proportions(both).tolist() == [0.1, 0.9]
    assert proportions(both, most=1.0).tolist() == [0.5, 0.5]
    assert proportions(both).dtype == torch.float64


def test_a_change_without_a_tensor_is_refused() -> None:
    with pytest.raises(KeyError):
        changes([Contribution("a", 1.0, {"x": torch.zeros(2)})], LAYOUT)
