"""What is averaged in which round, against the mean of the silos' whole products B·A in double precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import FrameError
from isthmus.federation.contribution import Contribution
from isthmus.federation.planner import RootPlanner
from isthmus.federation.rounds import Rounds
from isthmus.federation.sharing import Sharing
from isthmus.recipe import FederationSection, Recipe
from isthmus.storage.record import RoleDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import make_recipe

A, B, GATE = "q.lora_A.weight", "q.lora_B.weight", "boundary_gate.weight"
Tensors = dict[str, torch.Tensor]


def tensors_of(seed: int, rank: int = 3) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in ((A, (rank, 7)), (B, (5, rank)), (GATE, (5,)))}


def learned(sharing: Sharing, shared: Tensors, round: int, weights: list[float]) -> list[Contribution]:
    """Of each silo a change, of the tensors that an update in this round may change."""
    names = sharing.layout(shared, round).shapes
    return [
        Contribution(str(number), weight, {name: tensors_of(number, len(shared[A]))[name] for name in names})
        for number, weight in enumerate(weights)
    ]


def error(shared: Tensors, contributions: list[Contribution], result: Tensors) -> float:
    """Of the product after the round, relative to the weighted mean of the silos' own products."""
    total = sum(one.weight for one in contributions)
    products = []
    for one in contributions:
        own = {name: tensor.double() + one.change.get(name, 0.0) for name, tensor in shared.items()}
        products.append(one.weight / total * own[B] @ own[A])
    mean = torch.stack(products).sum(dim=0)
    return float((result[B].double() @ result[A].double() - mean).norm() / mean.norm())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.lists(st.floats(0.1, 1e5), min_size=2, max_size=6), st.sampled_from((1, 2, 3, 4)))
def test_every_alternating_round_is_exact(rank: int, weights: list[float], round: int) -> None:
    sharing, shared = Sharing(FederationSection(lora="alternating")), tensors_of(99, rank)
    contributions = learned(sharing, shared, round, weights)
    result = sharing.next(shared, round, contributions)
    assert error(shared, contributions, result) <= 1e-6
    trained, rests = (B, A) if round % 2 else (A, B)
    assert torch.equal(result[rests], shared[rests])
    assert not torch.equal(result[trained], shared[trained])
    assert not torch.equal(result[GATE], shared[GATE])


def test_plain_averages_are_not_exact() -> None:
    sharing, shared = Sharing(FederationSection(lora="plain")), tensors_of(99)
    contributions = learned(sharing, shared, 1, [1.0, 1.0, 1.0])
    assert error(shared, contributions, sharing.next(shared, 1, contributions)) > 0.1


def test_the_root_takes_the_factor_whose_round_it_is_and_plans_both(tmp_path: Path) -> None:
    recipe = make_recipe(Path("none"), federation={"lora": "alternating"}, train={"rounds": 3, "evaluate": False})
    shared, change = tensors_of(99), tensors_of(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in shared.items()}
    for round, due, other in ((1, B, A), (2, A, B), (3, B, A)):
        rounds = Rounds(recipe, RootPlanner(recipe, tensors_of(99), RoleDirectory(tmp_path)))
        plan = rounds.ready("a", pb.Ready()).result(10.0)
        assert plan.round == round
        for name, tensor in codec.decode_named(plan.adapters, shapes).items():
            assert torch.equal(tensor, shared[name])
        for wrong in ({other, GATE}, {A, B, GATE}):
            tensors = codec.encode_named({name: change[name] for name in wrong})
            with pytest.raises(FrameError):
                rounds.contribute("a", pb.Update(round=round, weight=1.0, tensors=tensors))
        tensors = codec.encode_named({name: change[name] for name in (due, GATE)})
        rounds.contribute("a", pb.Update(round=round, weight=1.0, tensors=tensors))
        for name in (due, GATE):
            shared[name] = (shared[name].double() + change[name]).float()


RANKS = {"small": 2, "middle": 3, "large": 5}
"""Of silos; the root's is the largest."""


def mixed() -> Recipe:
    silos = [{"name": name, "train": "x.jsonl", "rank": rank} for name, rank in RANKS.items()]
    return make_recipe(
        Path("none"),
        silo=silos,
        lora={"rank": max(RANKS.values())},
        federation={"lora": "svd"},
        train={"rounds": 2, "evaluate": False},
    )


def product(tensors: Tensors) -> torch.Tensor:
    return tensors[B].double() @ tensors[A].double()


def nearest(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-6 * expected.norm())


def test_silos_of_different_ranks_get_what_fits_and_the_root_the_mean_of_their_products(tmp_path: Path) -> None:
    """Width 5 and rank 5: the root's product is exact."""
    start = tensors_of(99, 5)
    planner = RootPlanner(mixed(), start, RoleDirectory(tmp_path))
    rounds = Rounds(mixed(), planner)
    answers = {name: rounds.ready(name, pb.Ready()) for name in RANKS}
    had = {}
    for name, rank in RANKS.items():
        shapes = {A: (rank, 7), B: (5, rank), GATE: (5,)}
        had[name] = codec.decode_named(answers[name].result(10.0).adapters, shapes)
        assert close(product(had[name]), nearest(product(start), rank))
    weights = {"small": 1.0, "middle": 2.0, "large": 3.0}
    changes = {name: tensors_of(number, RANKS[name]) for number, name in enumerate(RANKS)}
    foreign = pb.Update(round=1, weight=1.0, tensors=codec.encode_named(changes["large"]))
    with pytest.raises(FrameError, match=r"lora_A\.weight has shape"):
        rounds.contribute("small", foreign)
    for name, change in changes.items():
        update = pb.Update(round=1, weight=weights[name], tensors=codec.encode_named(change))
        rounds.contribute(name, update)
    own = {name: {key: had[name][key].double() + change[key] for key in change} for name, change in changes.items()}
    expected = sum((weights[name] / 6 * product(one) for name, one in own.items()), torch.zeros(1))
    assert close(product(planner.shared), expected)
    gate = sum((weights[name] / 6 * one[GATE] for name, one in own.items()), torch.zeros(1))
    assert close(planner.shared[GATE], gate)
    again = Rounds(mixed(), RootPlanner(mixed(), start, RoleDirectory(tmp_path)))  # a new process
    plans = [again.ready(name, pb.Ready()) for name in RANKS]
    smallest = codec.decode_named(plans[0].result(10.0).adapters, {A: (2, 7), B: (5, 2), GATE: (5,)})
    assert close(product(smallest), nearest(expected, 2))
