"""The clip of a noised sum stays, or follows the quantile of norms, for each factor of LoRA by itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import RecipeError
from isthmus.federation.clip import Clip
from isthmus.federation.collection import Collected
from isthmus.federation.sharing import Sharing
from isthmus.updates.flat import Layout
from isthmus.updates.quantize import Ring
from isthmus.updates.sums import SumFormat
from tests.conftest import make_recipe

SILOS = 4
FORMAT = SumFormat(Layout({"x": (3,)}), Ring(SILOS, 1.0), indicators=1)


def clip(**section: Any) -> Clip:
    noised = {"secure": True, "weights": "equal", "noise": {"epsilon": 8.0}, "clip": {"norm": 0.5, **section}}
    lora = {"lora": "alternating"} if "quantile" in section else {}
    recipe = make_recipe(Path("none"), silos=("a", "b", "c", "d"), federation={**noised, **lora})
    assert recipe.federation.clip is not None
    return Clip(recipe.federation.clip, Sharing(recipe.federation))


def collected(within: float) -> Collected:
    """A round in which so many of the silos said that they were within the clip."""
    ring = FORMAT.ring
    says = np.array([round((2 * within - SILOS) * ring.levels)], np.int64)
    total = np.concatenate([np.zeros(3, np.int64), says, SILOS * ring.encode_share(1.0).astype(np.int64)])
    return Collected(dict.fromkeys("abcd", 1.0), (), total, sums=FORMAT)


def test_without_a_quantile_it_stays() -> None:
    fixed = clip()
    fixed.follow(1, collected(SILOS))
    assert fixed.norm(1) == fixed.norm(2) == 0.5


@pytest.mark.parametrize("within", [0, 2, 4])
def test_it_follows_the_part_that_was_within(within: int) -> None:
    moving = clip(quantile=0.5, rate=0.2)
    moving.follow(1, collected(within))
    assert moving.norm(1) == pytest.approx(0.5 * math.exp(-0.2 * (within / SILOS - 0.5)))
    assert moving.norm(2) == 0.5, "the other factor has a clip of its own"
    assert moving.norm(3) == moving.norm(1)


def test_a_sum_that_noise_took_out_of_range_counts_as_its_end() -> None:
    moving, most = clip(quantile=0.5, rate=0.2), clip(quantile=0.5, rate=0.2)
    moving.follow(1, collected(9))
    most.follow(1, collected(SILOS))
    assert moving.norm(1) == most.norm(1)


def test_a_round_of_nobody_says_nothing_and_a_restart_forgets_nothing() -> None:
    moving, again = clip(quantile=0.5, rate=0.2), clip(quantile=0.5, rate=0.2)
    moving.follow(1, Collected({}, ()))
    assert moving.norm(1) == 0.5
    moving.follow(1, collected(0))
    again.load_state_dict(moving.state_dict())
    assert again.norm(1) == moving.norm(1) > 0.5


def test_a_clip_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError):
        clip(norm=0.0)
