"""``[trunk]``: averages of replicas."""

from __future__ import annotations

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import OUT, Changes, assert_mended, changed, least


@pytest.mark.parametrize("mended", [{"trunk.adapter": "replica"}, {"trunk.average_every": OUT}], ids=str)
def test_a_shared_adapter_is_not_averaged(mended: Changes) -> None:
    asked = {"trunk.adapter": "shared", "trunk.average_every": 2}
    assert_mended((asked, "trunk.average_every: a shared adapter is not averaged", "trunk.adapter = 'replica'", mended))


@pytest.mark.parametrize("every", [None, 1, 7])
def test_replicas_are_averaged_as_often_as_one_likes(every: int | None) -> None:
    asked = {"trunk.adapter": "replica", "trunk.average_every": OUT if every is None else every}
    assert Recipe.of(changed(least(), asked)).trunk.average_every == every
