"""What a silo gets does not depend on who shares the pass, on chunks, or on drafts: random mixes at a trunk.

``make bench-exactness`` runs a thousand of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from tests.oracle.mixes import TEXT_FAMILIES, TOLERANCE, World
from tests.oracle.ropes import OWN, ROPES, FirstState, save_roped_model

BY_LENGTH = (
    ("llama", "dynamic"),
    ("llama", "longrope"),
    ("phi3", "longrope"),
    ("gemma3_text", "dynamic"),
    ("olmo3", "longrope"),
)
"""The last two have a rope for each layer type."""
STATIC = [("llama", kind) for kind in ROPES if ("llama", kind) not in BY_LENGTH]
CASES = [*STATIC, *BY_LENGTH, *((family, OWN) for family in TEXT_FAMILIES)]
MIXES, OF_FAMILY = 5, 2
"""Random mixes of each kind of rope, and of each family with its own."""
Build = Callable[[str, str], World]


@pytest.fixture
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    built: list[World] = []

    def world(family: str, kind: str) -> World:
        folder = save_roped_model(family, kind, tmp_path_factory.mktemp("model"))
        built.append(World(folder, family, tmp_path_factory.mktemp("trunk")))
        return built[-1]

    yield world
    for one in built:
        one.close()


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_sequence_of_a_mix_gets_what_it_gets_alone(family: str, kind: str, build: Build) -> None:
    world, mixes = build(family, kind), OF_FAMILY if kind == OWN else MIXES
    found = [world.farthest(random.Random(seed)) for seed in range(mixes)]
    assert [far for far in found if far > TOLERANCE] == []


@pytest.mark.parametrize(("family", "kind"), BY_LENGTH)
def test_the_mixes_notice_frequencies_of_the_whole_pass(family: str, kind: str, build: Build) -> None:
    """With the family's own rope on the trunk, in place of the one by sequence."""
    world = build(family, kind)
    FirstState(world.service._runner.part.model)
    assert max(world.farthest(random.Random(seed)) for seed in range(3)) > 1e-2
