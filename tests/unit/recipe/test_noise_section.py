"""The recipe's sections on noise of sums and its clip: what they take, and what does not compose with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import RecipeError
from isthmus.recipe import ClipSection, NoiseSection, Recipe
from tests.conftest import make_recipe

NOISE: dict[str, Any] = {"multiplier": 1.0}
CLIP: dict[str, Any] = {"norm": 0.5}
AT_ROOT: dict[str, Any] = {"noise": {"multiplier": 1.0, "where": "root"}}
EDGES = [
    {"name": name, "address": "localhost:1", "silos": list(silos), "minimum": minimum}
    for name, silos, minimum in (("left", "abcd", 4), ("right", "efgh", 3))
]


def recipe(federation: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    asked = {"secure": True, "weights": "equal", "noise": NOISE, "clip": CLIP} | (federation or {})
    present = {key: value for key, value in asked.items() if value is not None}
    return make_recipe(Path("model"), silos=tuple("abcdefgh"), federation=present, **sections)


def test_noise_and_clip_as_asked_for(tmp_path: Path) -> None:
    made = recipe({"noise": {"epsilon": 8.0, "colluding": 2}, "clip": {"norm": 0.5, "quantile": 0.7}})
    assert made.federation.noise == NoiseSection(where="silos", epsilon=8.0, colluding=2)
    assert made.federation.clip == ClipSection(norm=0.5, quantile=0.7, rate=0.2, norms=0.1)
    (tmp_path / "recipe.toml").write_text(made.toml())
    assert Recipe.read(tmp_path / "recipe.toml").federation == made.federation


def test_without_them_sums_have_no_noise() -> None:
    made = recipe({"noise": None, "clip": None})
    assert made.federation.noise is None
    assert made.federation.clip is None


@pytest.mark.parametrize(
    ("federation", "sections"),
    [
        ({"lora": "alternating"}, {}),
        ({"compression": {"kind": "sketch", "feedback": False}}, {}),
        ({"compression": {"kind": "random-k", "feedback": False, "bits": 8}}, {}),
        ({"optimizer": "adam"}, {}),
        ({}, {"edge": EDGES, "root": {"minimum": 2}}),
        ({"robust": "median"}, {"edge": [*EDGES, EDGES[0] | {"name": "third", "silos": ["i", "j", "k", "l"]}]}),
        (AT_ROOT, {}),
        (AT_ROOT | {"secure": False}, {}),
        (AT_ROOT | {"secure": False, "compression": "top-k"}, {"boundary": {"update": {"clip": 1.0, "noise": 0.1}}}),
        ({}, {"boundary": {"update": {"noise": 1e-4}}}),
    ],
)
def test_what_composes(federation: dict[str, Any], sections: dict[str, Any]) -> None:
    silos = tuple("abcdefghijkl") if len(sections.get("edge", [])) == 3 else tuple("abcdefgh")
    asked = {"secure": True, "weights": "equal", "noise": NOISE, "clip": CLIP, **federation}
    assert make_recipe(Path("model"), silos=silos, federation=asked, **sections).federation.noise is not None


@pytest.mark.parametrize(
    ("federation", "sections", "told", "remedy"),
    [
        ({"clip": None}, {}, "federation.clip: noise is measured by a clip", "add federation.clip"),
        ({"noise": None}, {}, "federation.noise: noise is measured by a clip", "add federation.noise"),
        ({"secure": False}, {}, "without masks the root sees each update", "set federation.secure.masks = true"),
        ({"weights": "examples"}, {}, "a silo's influence follows from its rows", "weights = 'equal'"),
        ({"fairness": "tilted"}, {}, "follows from a silo's loss", "leave fairness out"),
        ({"control": "scaffold"}, {"train": {"optimizer": "sgd"}}, "no longer their mean", "control = 'none'"),
        (AT_ROOT | {"secure": False, "asynchronous": {"buffer": 2}}, {}, "all silos count alike", "leave buffer out"),
        ({"compression": "random-k"}, {}, "cut off by the clip again", "feedback = false"),
        ({"compression": {"bits": 8}}, {}, "cut off by the clip again", "feedback = false"),
        ({"secure": {"masks": True, "range": 0.5}}, {}, "no number is larger than federation.clip", "leave range out"),
        ({}, {"boundary": {"update": {"clip": 1.0, "noise": 0.1}}}, "the sum is noised", "leave boundary.update out"),
        ({}, {"boundary": {"update": {"noise": 0.1}}}, "the sum is noised", "leave boundary.update out"),
        (
            {},
            {"boundary": {"update": {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 1.0, "delta": 1e-5}}},
            "the sum is noised",
            "leave boundary.update out",
        ),
        (AT_ROOT, {"edge": EDGES}, "with [[edge]] it forms no such mean", "leave [[edge]] out"),
        (
            AT_ROOT | {"secure": False, "robust": "median"},
            {},
            "with federation.robust it forms no",
            "leave",
        ),
        (
            AT_ROOT | {"secure": False, "lora": "svd"},
            {},
            "products of factors",
            "leave federation.weights",
        ),
        (AT_ROOT | {"secure": False, "weights": "examples"}, {}, "follows from its rows", "weights = 'equal'"),
        (AT_ROOT | {"secure": False, "weights": "examples", "lora": "svd"}, {}, "follows from its rows", "'equal'"),
        ({"noise": NOISE | {"colluding": 8}}, {}, "8 of 8 silos leave nobody", "lower it"),
        ({"noise": NOISE | {"colluding": 3}}, {"edge": EDGES}, "3 of 3 silos leave nobody", "raise the minimum"),
        (
            {"noise": {"multiplier": 1.0, "epsilon": 3.0}},
            {},
            "the size of the noise is given once",
            "either multiplier or epsilon",
        ),
        ({"noise": {}}, {}, "given once", "either multiplier or epsilon"),
        ({"noise": NOISE | {"where": "root", "colluding": 1}}, {}, "the root alone draws", "leave colluding out"),
        ({"clip": CLIP | {"rate": 0.5}}, {}, "only a clip that adapts takes it", "add quantile"),
        ({"clip": CLIP | {"norms": 0.5}}, {}, "only a clip that adapts takes it", "add quantile"),
        (
            {"noise": NOISE | {"where": "root"}},
            {
                "privacy": {"silo_epsilon": 1.0},
                "boundary": {p: {"clip": 1.0, "noise": 1.0} for p in ("forward", "gradient")},
            },
            "boundary.update has no clip",
            "leave the budget out",
        ),
    ],
)
def test_what_does_not_compose_is_refused(
    federation: dict[str, Any], sections: dict[str, Any], told: str, remedy: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(federation, **sections)
    assert told in caught.value.message
    assert remedy in caught.value.remedy


def test_top_k_and_products_are_refused_under_masks_as_ever() -> None:
    with pytest.raises(RecipeError, match="a masked sum adds the same places"):
        recipe({"compression": "top-k"})
    with pytest.raises(RecipeError, match="multiplies each silo's factors"):
        recipe({"lora": "svd"})


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"noise": {"multiplier": 0.0}}, "noise.multiplier"),
        ({"noise": {"epsilon": -1.0}}, "noise.epsilon"),
        ({"noise": NOISE | {"where": "edges"}}, "noise.where"),
        ({"noise": NOISE | {"colluding": -1}}, "noise.colluding"),
        ({"clip": {"norm": 0.0}}, "clip.norm"),
        ({"clip": CLIP | {"quantile": 1.0}}, "clip.quantile"),
        ({"clip": CLIP | {"quantile": 0.5, "norms": 1.0}}, "clip.norms"),
        ({"clip": CLIP | {"quantile": 0.5, "rate": 0.0}}, "clip.rate"),
    ],
)
def test_a_wrong_value_names_its_key(section: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(section)
    assert caught.value.message.startswith(f"federation.{key} = ")


def test_a_silos_budget_is_kept_by_noise_in_the_sum() -> None:
    bounded = {path: {"clip": 1.0, "noise": 1.0} for path in ("forward", "gradient")}
    assert recipe(privacy={"silo_epsilon": 5.0}, boundary=bounded).privacy.silo_epsilon == 5.0
