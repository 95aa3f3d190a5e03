"""SIGKILL before a write or a change of state: the role starts again, and the federation ends as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.recipe import Recipe
from tests.hostile.killed import assert_whole, federate, masked, plain

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
FEDERATIONS = {"plain": (plain, ("trunk", "root", "north")), "masked": (masked, ("ward", "west"))}
TIMES = 3
"""Kills of each role, evenly over its writes; ``benchmarks/federated/kills.py`` has one before each."""


@pytest.mark.parametrize("name", FEDERATIONS)
def test_a_role_that_is_killed_at_any_write_comes_back_and_the_result_is_the_same(name: str, tmp_path: Path) -> None:
    make, roles = FEDERATIONS[name]
    recipe: Recipe = make(tmp_path / "federation")
    for role in roles:
        undisturbed = tmp_path / role
        undisturbed.mkdir()
        events = federate(recipe, undisturbed, role, None).events
        assert events > 10
        for at in range(events // (TIMES + 1), events, events // TIMES):
            folder = tmp_path / f"{role}-{at}"
            folder.mkdir()
            outcome = federate(recipe, folder, role, at)
            assert outcome.finished
            assert outcome.killed
            assert_whole(recipe, folder, undisturbed)
