"""The aggregation of adapters against averaging whole weight changes B·A, in double precision."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.federation.contribution import Contribution
from isthmus.federation.strategies.strategy import Strategy
from isthmus.recipe import FederationSection

Tensors = dict[str, torch.Tensor]
Updates = list[tuple[float, Tensors]]
NAMES = ("layers.0.lora_B.weight", "layers.1.lora_B.weight")


@dataclass(frozen=True)
class Federation:
    base: Tensors
    updates: Updates
    frozen: Tensors
    """A of each layer, the same at every silo."""


@st.composite
def federations(draw: st.DrawFn) -> Federation:
    rank, width, inputs = (draw(st.integers(1, most)) for most in (6, 12, 12))
    weights = draw(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def random(*shape: int) -> Tensors:
        return {name: torch.randn(shape, generator=generator) for name in NAMES}

    return Federation(random(width, rank), [(weight, random(width, rank)) for weight in weights], random(rank, inputs))


def combine(base: Tensors, updates: Updates) -> Tensors:
    contributions = [Contribution(str(number), *update) for number, update in enumerate(updates)]
    return Strategy(FederationSection()).next(base, contributions)


@settings(max_examples=60, deadline=None)
@given(federations())
def test_mean_of_weight_changes(federation: Federation) -> None:
    """Every silo's whole weight change, averaged, is the change that the combined B makes."""
    combined = combine(federation.base, federation.updates)
    total = sum(weight for weight, _ in federation.updates)
    for name, base in federation.base.items():
        a = federation.frozen[name].double()
        naive = torch.zeros(base.shape[0], a.shape[1], dtype=torch.float64)
        for weight, change in federation.updates:
            trained = base.double() + change[name].double()
            naive += weight / total * (trained @ a - base.double() @ a)
        assert combined[name].dtype == torch.float32
        actual = (combined[name].double() - base.double()) @ a
        scale = max(1.0, float(naive.abs().max()), float((base.double() @ a).abs().max()))
        assert (actual - naive).abs().max() < 1e-6 * scale


@given(federations())
def test_nothing_learned_changes_nothing(federation: Federation) -> None:
    still = [
        (weight, {name: torch.zeros_like(tensor) for name, tensor in change.items()})
        for weight, change in federation.updates
    ]
    combined = combine(federation.base, still)
    assert all(torch.equal(combined[name], tensor) for name, tensor in federation.base.items())


@given(federations(), st.floats(1e-3, 1e3))
def test_only_the_weights_proportions_count(federation: Federation, factor: float) -> None:
    scaled = [(weight * factor, change) for weight, change in federation.updates]
    combined = combine(federation.base, federation.updates)
    for name, tensor in combine(federation.base, scaled).items():
        torch.testing.assert_close(tensor, combined[name], rtol=1e-6, atol=1e-6)


def test_a_silo_without_a_change_pulls_towards_the_base() -> None:
    base = {"x": torch.tensor([1.0, 2.0])}
    updates = [(3.0, {"x": torch.zeros(2)}), (1.0, {"x": torch.tensor([4.0, -4.0])})]
    assert combine(base, updates)["x"].tolist() == [2.0, 1.0]


@given(federations())
def test_of_nobody_nothing_changes(federation: Federation) -> None:
    still = combine(federation.base, [])
    assert all(torch.equal(still[name], tensor) for name, tensor in federation.base.items())


@given(federations())
def test_one_silo_gives_base_and_update(federation: Federation) -> None:
    weight, change = federation.updates[0]
    combined = combine(federation.base, [(weight, change)])
    for name, base in federation.base.items():
        assert torch.equal(combined[name], base + change[name])


@settings(max_examples=20)
@given(federations())
def test_order_of_arrival_does_not_matter(federation: Federation) -> None:
    """Silos come in any order and are sorted by name, as the root does: the same bits."""
    named = {f"silo-{number}": update for number, update in enumerate(federation.updates[:4])}
    expected = combine(federation.base, list(named.values()))
    for order in itertools.permutations(named):
        arrived = {name: named[name] for name in order}
        combined = combine(federation.base, [arrived[name] for name in sorted(arrived)])
        assert all(torch.equal(combined[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_stay_as_they_are(dtype: torch.dtype) -> None:
    base, change = {"x": torch.ones(3, dtype=dtype)}, {"x": torch.ones(3)}
    assert combine(base, [(1.0, change), (1.0, change)])["x"].dtype == dtype
    assert base["x"].tolist() == change["x"].tolist() == [1.0] * 3
