"""One row of numbers for named tensors, and back."""

from __future__ import annotations

import torch

from isthmus.updates.flat import Layout

SHAPES = {"y": (2, 3), "x": (), "z": (0, 4), "w": (5,)}


def test_there_and_back_in_the_order_of_names() -> None:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    layout = Layout(SHAPES)
    row = layout.row(dict(reversed(tensors.items())))
    assert row.shape == (layout.size,) == (12,)
    assert torch.equal(row, torch.cat([tensors[name].reshape(-1) for name in "wxyz"]))
    assert all(torch.equal(back, tensors[name]) for name, back in layout.tensors(row).items())


def test_a_row_is_fp32_and_keeps_no_graph() -> None:
    row = Layout({"x": (2,)}).row({"x": torch.ones(2, dtype=torch.float64, requires_grad=True)})
    assert row.dtype == torch.float32
    assert not row.requires_grad


def test_nothing_at_all() -> None:
    assert Layout({}).row({}).shape == (0,)
    assert Layout({}).tensors(torch.zeros(0)) == {}
