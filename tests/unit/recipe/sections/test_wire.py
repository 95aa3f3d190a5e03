"""``[wire]``: connections between the parties."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import changed, least, refused


def test_frames_of_sixty_four_megabytes_and_deadlines_that_follow() -> None:
    wire = Recipe.of(least()).wire
    assert (wire.deadline, wire.answer_deadline, wire.max_frame_bytes) == (None, None, 64 * 2**20)


@pytest.mark.parametrize(("key", "bad"), [("deadline", 0.0), ("max_frame_bytes", 0), ("certificates", 1)])
def test_wrong_values_are_refused(key: str, bad: Any) -> None:
    assert refused(changed(least(), {f"wire.{key}": bad})).message.startswith(f"wire.{key} = ")
