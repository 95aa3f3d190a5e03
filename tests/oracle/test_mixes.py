"""What a silo gets does not depend on who shares the pass, on chunks, or on drafts: random mixes at a trunk.

``make bench-exactness`` runs a thousand of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from isthmus.model.rope import by_length
from tests.oracle.mixes import TOLERANCE, World
from tests.oracle.ropes import ROPES, FirstState, save_roped_model

CASES = [*(("llama", kind) for kind in ROPES), ("phi3", "longrope")]
MIXES = 6


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    family, kind = request.param
    folder = save_roped_model(family, kind, tmp_path_factory.mktemp("model"))
    made = World(folder, family, tmp_path_factory.mktemp("trunk"))
    yield made
    made.close()


def test_every_sequence_of_a_mix_gets_what_it_gets_alone(world: World) -> None:
    assert [far for far in (world.farthest(random.Random(seed)) for seed in range(MIXES)) if far > TOLERANCE] == []


def test_the_mixes_notice_frequencies_of_the_whole_pass(world: World) -> None:
    """With the family's own rope on the trunk, in place of the one by sequence."""
    part = world.service._runner.part
    FirstState(part.model)
    far = [world.farthest(random.Random(seed)) for seed in range(3)]
    assert (max(far) > 1e-2) == by_length(part.config)
