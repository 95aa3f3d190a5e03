"""The recipe: what is read, and what is refused with key, reason and remedy."""

from __future__ import annotations

import copy
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from isthmus.errors import RecipeError
from isthmus.recipe import Recipe

SHIPPED = Path(__file__).parents[3] / "recipes" / "federation.toml"
LEAST: dict[str, Any] = {
    "model": {"path": "org/name"},
    "train": {"evaluate": False},
    "silo": [{"name": "a", "train": "a.jsonl"}, {"name": "b", "train": "b.jsonl"}],
}
Change = Callable[[dict[str, Any]], object]


def values_with(key: str, value: object) -> dict[str, Any]:
    """The least recipe with one key changed, named like ``silo.0.train``."""
    values = copy.deepcopy(LEAST)
    *path, last = key.split(".")
    section: Any = values
    for part in path:
        section = section[int(part)] if isinstance(section, list) else section.setdefault(part, {})
    section[last] = value
    return values


def refused(values: dict[str, Any]) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        Recipe.of(values)
    assert caught.value.remedy
    return caught.value


def test_the_shipped_recipe_holds_the_defaults() -> None:
    recipe = Recipe.read(SHIPPED)
    least = Recipe.of({**LEAST, "model": {"path": recipe.model.path}})
    assert [silo.name for silo in recipe.silo] == ["north", "south"]
    for name in ("seed", "threads", "model", "lora", "boundary", "trunk", "root", "federation"):
        assert getattr(recipe, name) == getattr(least, name), name
    assert recipe.train == least.train.model_copy(update={"evaluate": True})
    assert recipe.wire.model_copy(update={"certificates": "certificates"}) == least.wire
    assert recipe.tree.node("root").minimum == 2


def test_the_shipped_recipe_names_every_key() -> None:
    def keys(model: Any, values: dict[str, Any]) -> set[str]:
        missing = set(model.model_fields) - set(values)
        return missing | {
            f"{key}.{one}"
            for key, value in values.items()
            if isinstance(value, dict)
            for one in keys(model.model_fields[key].annotation, value)
        }

    calibrated = {
        f"boundary.{path}.{key}" for path in ("forward", "gradient", "update") for key in ("epsilon", "delta")
    }
    assert keys(Recipe, tomllib.loads(SHIPPED.read_text())) == calibrated | {
        *("threads", "root.minimum", "trunk.average_every", "trunk.dtype"),
        *("boundary.tail", "boundary.width", "boundary.defence", "sensitivity", "edge", "federation.robust.trusted"),
        *(
            "privacy.record_epsilon",
            "privacy.silo_epsilon",
            "federation.optimizer.learning_rate",
            "federation.compression.bits",
        ),
        "federation.asynchronous.buffer",
        *("federation.noise", "federation.clip"),
    }


EDGE = {"name": "e", "address": "localhost:1", "silos": ["a", "b"]}
CIRCLE = [EDGE | {"parent": "f"}, EDGE | {"name": "f", "silos": [], "parent": "e"}]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sede", "seed"),
        ("trian", "train"),
        ("model.botom", "bottom"),
        ("lora.alhpa", "alpha"),
        ("lora.freeze_botom", "freeze_bottom"),
        ("train.learning_rat", "learning_rate"),
        ("task.choice", "choices"),
        ("boundary.forwards", "forward"),
        ("boundary.gradient.nois", "noise"),
        ("wire.certificate", "certificates"),
        ("boundary.releas_once", "release_once"),
        ("trunk.leese", "lease"),
        ("trunk.keptbytes", "kept_bytes"),
        ("root.minimun", "minimum"),
        ("federation.laro", "lora"),
        ("silo.1.heldout", "held_out"),
        ("silo.0.qqq", ""),
    ],
)
def test_an_unknown_key_names_the_nearest_known(key: str, near: str) -> None:
    error = refused(values_with(key, 1))
    assert error.message == f"unknown key {key!r}"
    assert error.remedy.startswith(f"did you mean {near!r}?" if near else "did you mean")
    assert "known: " in error.remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "0"),
        ("seed", True),
        ("seed", 1.0),
        ("threads", 0),
        ("model", "folder"),
        ("model.path", 3),
        ("model.bottom", "2"),
        ("model.bottom", 0),
        ("model.top", -1),
        ("model.top", 2.5),
        ("model.dtype", "float8"),
        ("lora.rank", True),
        ("lora.rank", 0),
        ("lora.alpha", 0.0),
        ("lora.alpha", math.nan),
        ("lora.alpha", "16"),
        ("lora.targets", []),
        ("lora.targets", "q_proj"),
        ("lora.freeze_bottom", 1),
        ("train.rounds", 0),
        ("train.steps", -3),
        ("train.batch", math.inf),
        ("train.optimizer", "adam"),
        ("train.learning_rate", 0),
        ("train.learning_rate", math.inf),
        ("train.learning_rate", True),
        ("train.evaluate", 1),
        ("train.max_tokens", 0),
        ("task.choices", "yes"),
        ("boundary.codec.gradient_up", "fp64"),
        ("boundary.forward.noise", -0.1),
        ("boundary.forward.noise", math.nan),
        ("boundary.gradient.clip", "1"),
        ("boundary.update.clip", math.inf),
        ("boundary.release_once", "yes"),
        ("boundary.defence.inverter", -1.0),
        ("boundary.defence.answer", math.inf),
        ("wire.deadline", 0.0),
        ("wire.max_frame_bytes", 0),
        ("trunk.lease", -1.0),
        ("trunk.sessions", 0),
        ("trunk.kept_bytes", 0),
        ("trunk.kept_bytes", 1e9),
        ("trunk.session_bytes", 0),
        ("trunk.chunk", 0),
        ("trunk.together", 0),
        ("trunk.gather", -0.1),
        ("trunk.gather", math.inf),
        ("trunk.adapter", "own"),
        ("trunk.average_every", 0),
        ("root.minimum", 0),
        ("federation.lora", "average"),
        ("federation.lora", "frozen-b"),
        ("federation.compression.kind", "zip"),
        ("federation.compression.keep", 0.0),
        ("federation.compression.keep", 1.5),
        ("federation.compression.bits", 1),
        ("federation.compression.bits", 33),
        ("federation.robust.rule", "krumm"),
        ("federation.robust.malicious", 0.0),
        ("federation.robust.malicious", 0.5),
        ("federation.robust.malicious", math.nan),
        ("federation.robust.mix", 1),
        ("silo", []),
        ("silo", {"name": "a"}),
        ("silo.0.name", ""),
        ("silo.0.train", None),
    ],
)
def test_a_wrong_value_names_its_key(key: str, value: object) -> None:
    error = refused(values_with(key, value))
    assert error.message.startswith(f"{key} = ")
    assert error.remedy == f"correct the value of {key}"


@pytest.mark.parametrize(
    ("drop", "key"),
    [
        (lambda values: values.pop("model"), "model"),
        (lambda values: values["model"].pop("path"), "model.path"),
        (lambda values: values.pop("silo"), "silo"),
        (lambda values: values["silo"][1].pop("name"), "silo.1.name"),
        (lambda values: values["silo"][0].pop("train"), "silo.0.train"),
    ],
)
def test_a_missing_key_is_named(drop: Change, key: str) -> None:
    values = copy.deepcopy(LEAST)
    drop(values)
    error = refused(values)
    assert error.message == f"the key {key!r} is missing"
    assert error.remedy == f"add {key} to the recipe"


DP = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 2.0, "delta": 1e-5}
METRIC = {"mechanism": "metric", "epsilon": 2.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("boundary.forward", DP | {"epsilon": epsilon}) for epsilon in (0.0, -1.0, float("inf"), float("nan"))],
        *[("boundary.gradient", DP | {"delta": delta}) for delta in (0.0, 1.0, -1e-5, 2.0, float("nan"))],
        *[("boundary.update", METRIC | {"epsilon": epsilon}) for epsilon in (0.0, -3.0)],
        *[("privacy", {"delta": delta}) for delta in (0.0, 1.0, -1e-5, float("nan"))],
        *[("privacy", {key: value}) for key in ("record_epsilon", "silo_epsilon") for value in (0.0, -1.0)],
        ("boundary.forward", DP | {"unit": "silo"}),
        ("boundary.forward", {"mechanism": "laplace"}),
    ],
    ids=str,
)
def test_an_epsilon_or_delta_that_means_nothing(key: str, value: dict[str, Any]) -> None:
    error = refused(values_with(key, value))
    assert error.message.startswith(f"{key}.")
    assert error.remedy.startswith(f"correct the value of {key}.")


def test_a_frozen_bottom_cannot_learn_a_defence() -> None:
    values = values_with("boundary.defence", {"inverter": 1.0})
    values["lora"] = {"freeze_bottom": True}
    error = refused(values)
    assert "boundary.defence: a frozen bottom learns nothing" in error.message
    assert error.remedy == "set lora.freeze_bottom = false"


def test_a_rank_of_its_own_needs_a_root_that_multiplies() -> None:
    values = values_with("silo.0.rank", 4) | {"federation": {"lora": "svd"}, "lora": {"rank": 8, "alpha": 12.0}}
    recipe = Recipe.of(values)
    own, other = recipe.of_silo("a"), recipe.of_silo("b")
    assert (own.lora.rank, own.lora.alpha, other) == (4, 6.0, recipe)
    assert refused(values | {"lora": {"rank": 3}}).remedy == "raise lora.rank"
    values["silo"] = [{"name": name, "train": "x.jsonl"} for name in "abc"]
    error = refused(values | {"federation": {"lora": "svd", "secure": True}})
    assert error.message.startswith("federation.lora: the root multiplies each silo's factors, and of a masked sum")


def test_noise_that_is_not_kept_cannot_be_taken_out() -> None:
    values = values_with("boundary", {"release_once": True, "denoise": True})
    values["lora"] = {"freeze_bottom": True}
    assert "boundary.denoise: the noise of examples released once is not kept" in refused(values).message


def test_budgets_where_everything_is_bounded() -> None:
    values = values_with("privacy", {"record_epsilon": 5.0, "silo_epsilon": 9.0, "delta": 1e-6})
    values["boundary"] = {"forward": DP, "gradient": METRIC | {"clip": 1.0}, "update": {"clip": 1.0, "noise": 0.5}}
    recipe = Recipe.of(values)
    assert (recipe.privacy.record_epsilon, recipe.boundary.forward.epsilon) == (5.0, 2.0)
    assert Recipe.of({**values, "boundary": {**values["boundary"], "gradient": {"clip": 1.0, "noise": 0.1}}})


@pytest.mark.parametrize(
    ("key", "value", "complaint", "remedy"),
    [
        ("silo.1.name", "a", "the name 'a' is given twice", "rename one"),
        ("silo.1.name", "trunk", "'trunk', 'root' and 'ca' are roles", "another name"),
        ("silo.0.name", "root", "'trunk', 'root' and 'ca' are roles", "another name"),
        ("silo.0.name", "ca", "'trunk', 'root' and 'ca' are roles", "another name"),
        ("edge", [EDGE | {"silos": ["z"]}], "edge 'e': no silo is called 'z'", "name silos of the recipe"),
        ("edge", [EDGE | {"parent": "f"}], "edge 'e': parent = 'f' is no other edge", "name one"),
        ("edge", [EDGE | {"sibling": "e"}], "edge 'e': sibling = 'e' is no other edge", "name one"),
        ("edge", [EDGE, EDGE | {"name": "f", "silos": ["a"]}], "the silo 'a' has two edges", "leave it to one"),
        ("edge", [EDGE | {"silos": []}], "the edge 'e' has neither silos nor edges", "leave it out"),
        ("edge", [EDGE | {"minimum": 3}], "e.minimum: 3 silos needed but 2 listed", "lower it"),
        ("edge", [EDGE | {"name": "a"}], "the name 'a' is given twice", "rename one"),
        ("edge", CIRCLE, "edge 'e' is above itself", "let its parents end at the root"),
        ("edge", [EDGE, EDGE | {"name": "f", "silos": [], "sibling": "e"}], "the edge 'f' has neither", "leave it out"),
        ("trunk.average_every", 2, "trunk.average_every: a shared adapter", "trunk.adapter = 'replica'"),
        ("trunk", {"adapter": "shared", "average_every": 1}, "a shared adapter is not averaged", "'replica'"),
        ("root.minimum", 3, "root.minimum: 3 silos needed but 2 listed", "lower it"),
        ("train.evaluate", True, "train.evaluate: no silo has held_out rows", "set train.evaluate = false"),
        ("boundary.release_once", True, "boundary.release_once: a bottom that trains", "lora.freeze_bottom = true"),
        (
            "boundary.defence",
            {"answer": 1.0, "capacity": 0.1},
            "boundary.defence.capacity: without noise",
            "give boundary.forward both",
        ),
        ("boundary", {"release_once": True, "denoise": True}, "boundary.release_once: a bottom", "freeze_bottom"),
        ("silo.0.rank", 4, "silo.rank: factors of different ranks have no mean", "set federation.lora = 'svd'"),
        ("boundary", {"gradients": False, "defence": {}}, "boundary.defence: no loss", "boundary.residual = true"),
        ("boundary.forward", DP | {"clip": 0.0}, "clip: the mechanism 'dp_gaussian' needs it", "add clip"),
        ("boundary.forward", DP | {"noise": 0.1}, "noise: the mechanism 'dp_gaussian' does not", "leave noise out"),
        ("boundary.update", {"epsilon": 1.0}, "epsilon: the mechanism 'gaussian' does not", "leave epsilon out"),
        ("boundary.gradient", {"mechanism": "metric"}, "epsilon: the mechanism 'metric' needs it", "add epsilon"),
        ("boundary.gradient", METRIC | {"delta": 0.1}, "delta: the mechanism 'metric' does not", "leave delta out"),
        ("privacy", {"record_epsilon": 5.0}, "privacy.record_epsilon: what leaves by boundary.forward", "give"),
        ("privacy", {"silo_epsilon": 5.0}, "privacy.silo_epsilon: what leaves by boundary.forward", "leave the budget"),
        ("federation", {"secure": True, "compression": "top-k"}, "the same places of all", "none, random-k, sketch"),
        (
            "federation",
            {"compression": {"kind": "top-k", "feedback": False}},
            "never among the largest",
            "feedback = true",
        ),
        (
            "federation",
            {"compression": {"bits": 5}},
            "federation.compression.bits: 5",
            "4, 8, 16 or 32",
        ),
        (
            "federation",
            {"secure": True, "compression": {"bits": 32}},
            "compression.bits: 32 bits",
            "2 to 16",
        ),
    ],
)
def test_what_cannot_be_is_refused(key: str, value: object, complaint: str, remedy: str) -> None:
    error = refused(values_with(key, value))
    assert complaint in error.message
    assert remedy in error.remedy


def federated(silos: int, minimum: int | None = None, masks: bool = False, **robust: Any) -> dict[str, Any]:
    named = [{"name": f"s{number}", "train": "rows.jsonl"} for number in range(silos)]
    root = {} if minimum is None else {"minimum": minimum}
    return {**LEAST, "silo": named, "root": root, "federation": {"secure": masks, "robust": robust}}


@pytest.mark.parametrize(
    ("values", "complaint", "remedy"),
    [
        (federated(3, masks=True, rule="median"), "federation.robust: under masks the root sees one sum", "'mean'"),
        (federated(3, masks=True, mix=True), "federation.robust: under masks the root sees one sum", "mix = false"),
        (federated(2, rule="median"), "of 2 silos 1 may be malicious, and against that 'median' needs 3", "more silos"),
        (
            federated(4, rule="krum"),
            "of 4 silos 1 may be malicious, and against that 'krum' needs 5",
            "change federation.robust.rule",
        ),
        (federated(9, 4, rule="krum"), "of 4 silos 1 may be malicious", "raise root.minimum"),
        (federated(6, rule="bulyan"), "'bulyan' needs 7", "change federation.robust.rule"),
        (federated(10, rule="bulyan"), "of 10 silos 2 may be malicious, and against that 'bulyan' needs 11", "change"),
        (federated(5, rule="median", malicious=0.499), "", ""),
        (federated(2, mix=True), "'mean' needs 3", "more silos"),
        (federated(5, rule="fltrust"), "federation.robust.trusted: the rule 'fltrust' needs it", "name a silo"),
        (
            federated(5, trusted="s1"),
            "the rule 'fltrust' needs it, and no other",
            "leave it out",
        ),
        (
            federated(2, rule="fltrust", trusted="x"),
            "federation.robust.trusted: 'x' sends nothing to the root",
            "use one of: s0, s1",
        ),
        (
            federated(5, rule="fltrust", trusted="s1", mix=True),
            "robust.mix: the trusted change",
            "mix = false",
        ),
        (federated(5, 5, rule="krum"), "", ""),
        (federated(9, 7, rule="bulyan"), "", ""),
        (federated(1, rule="fltrust", trusted="s0"), "", ""),
        (federated(5, 3, rule="trimmed-mean", mix=True), "", ""),
    ],
    ids=lambda value: str(value["federation"]) if isinstance(value, dict) else "",
)
def test_a_rule_that_could_not_bear_what_it_is_for(values: dict[str, Any], complaint: str, remedy: str) -> None:
    if not complaint:
        assert Recipe.of(values).federation.robust.rule == values["federation"]["robust"]["rule"]
        return
    error = refused(values)
    assert complaint in error.message
    assert remedy in error.remedy


@pytest.mark.parametrize("name", ["A", "-a", "_a", "a b", "a/b", "../a", "a.b", "ä", "a\n", "a" * 64])
def test_a_name_that_could_not_be_a_folder_or_a_certificate(name: str) -> None:
    assert refused(values_with("silo.0.name", name)).message.startswith("silo.0.name = ")


@pytest.mark.parametrize("name", ["x", "0", "north-1", "a_b", "a" * 63])
def test_a_good_name(name: str) -> None:
    assert Recipe.of(values_with("silo.0.name", name)).silo[0].name == name


def test_a_whole_number_may_stand_for_a_fraction() -> None:
    assert Recipe.of(values_with("lora.alpha", 16)).lora.alpha == 16.0


@pytest.mark.parametrize("content", [b"seed = ", b"[model\n", b"seed = 1\nseed = 2", b'x = "caf\xe9"', b"\xff\xfe"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.toml is not TOML") as caught:
        Recipe.read(tmp_path / "r.toml")
    assert caught.value.remedy == "mend the line it names"


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe") as caught:
        Recipe.read(tmp_path / name)
    assert str(tmp_path) in caught.value.message
    assert caught.value.remedy == "check the path"


def test_toml_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.read(SHIPPED)
    path = tmp_path / "again.toml"
    for one in (recipe, recipe.model_copy(update={"threads": 3}), Recipe.of(LEAST).anchored(tmp_path)):
        path.write_text(one.toml(), encoding="utf-8")
        assert Recipe.read(path) == one


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe.of(LEAST)
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        recipe.boundary.forward.noise = 1.0  # type: ignore[misc]
    assert isinstance(recipe.silo, tuple)
    assert isinstance(recipe.lora.targets, tuple)


def test_paths_are_anchored_at_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    values = values_with("silo.0.held_out", "/data/h.jsonl")
    (tmp_path / "deep" / "r.toml").write_text(Recipe.of(values).toml())
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.read(Path("deep/r.toml"))
    folder = str(tmp_path / "deep")
    assert recipe.wire.certificates == f"{folder}/certificates"
    assert [silo.train for silo in recipe.silo] == [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]
    assert [silo.held_out for silo in recipe.silo] == ["/data/h.jsonl", None]


@pytest.mark.parametrize(
    ("path", "anchored"),
    [("org/name", "org/name"), ("./x", "{}/x"), ("/models/x", "/models/x"), ("here", "{}/here"), ("~/x", "{home}/x")],
)
def test_a_model_path_is_a_folder_or_a_hub_id(tmp_path: Path, path: str, anchored: str) -> None:
    (tmp_path / "here").mkdir()
    recipe = Recipe.of(values_with("model.path", path)).anchored(tmp_path)
    assert recipe.model.path == anchored.format(tmp_path, home=Path.home())


@pytest.mark.parametrize("every", [None, 1, 7])
def test_replicas_are_averaged_as_often_as_one_likes(every: int | None) -> None:
    section = {"adapter": "replica"} | ({} if every is None else {"average_every": every})
    assert Recipe.of(values_with("trunk", section)).trunk.average_every == every


def test_party() -> None:
    recipe = Recipe.of(LEAST)
    assert recipe.party("b") is recipe.silo[1]
    with pytest.raises(RecipeError, match="no silo 'c'") as caught:
        recipe.party("c")
    assert caught.value.remedy == "use one of: a, b"


def test_one_codec_stands_for_all_four() -> None:
    codecs = Recipe.of(values_with("boundary.codec", "int8+zstd")).boundary.codec
    assert set(codecs.model_dump().values()) == {"int8+zstd"}
    mixed = Recipe.of(values_with("boundary.codec", {"forward_up": "int4"})).boundary.codec
    assert (mixed.forward_up, mixed.gradient_down) == ("int4", "fp32")


def test_a_misspelt_section_is_named_before_the_one_that_is_missing() -> None:
    error = refused({"modle": {"path": "org/name"}, "silo": [{"name": "a", "train": "a.jsonl"}]})
    assert error.message == "unknown key 'modle'"
    assert error.remedy.startswith("did you mean 'model'?")


@pytest.mark.parametrize(
    ("edges", "complaint"),
    [
        ([], "of a sum of two silos' updates each knows the other's"),
        ([{**EDGE, "silos": list("abcd"), "minimum": 2}], "of a sum of two silos"),
        ([{**EDGE, "silos": list("abc")}], "'root' would see the update of a silo beside edges by itself"),
    ],
)
def test_masks_want_cohorts_of_three(edges: list[dict[str, Any]], complaint: str) -> None:
    values = LEAST | {"edge": edges, "federation": {"secure": True}}
    silos = [{"name": name, "train": f"{name}.jsonl"} for name in ("abcd" if edges else "ab")]
    assert complaint in refused(values | {"silo": silos}).message


def test_equal_weights_are_no_cohorts() -> None:
    values = LEAST | {"edge": [EDGE], "federation": {"weights": "equal"}}
    assert "an edge sends for a whole cohort" in refused(values).message


def test_the_tree_of_a_recipe() -> None:
    edges = [
        {"name": "low", "address": "l:1", "silos": ["a", "b", "c"], "parent": "high", "minimum": 2},
        {"name": "high", "address": "h:1", "silos": ["d"], "patience": 8.0},
        {"name": "near", "address": "n:1", "silos": ["e"], "sibling": "low"},
    ]
    silos = [{"name": name, "train": f"{name}.jsonl"} for name in "abcdef"]
    tree = Recipe.of(LEAST | {"edge": edges, "silo": silos, "root": {"minimum": 2}}).tree
    assert [tree.parent(name) for name in (*"adf", "low", "high")] == ["low", "high", "root", "high", "root"]
    assert tree.node("root").children == ("high", "near", "f")
    assert tree.node("high").children == ("low", "d")
    assert (tree.node("low").wards, tree.node("low").patience, tree.sibling("near")) == (("e",), 2.0, "low")
    assert [tree.leaf(name) for name in ("low", "high", "root")] == [True, False, False]
    assert [tree.fewest(name) for name in ("low", "high", "root")] == [2, 3, 2]
