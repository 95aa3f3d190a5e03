"""The recipe: what is read, and what is refused with key, reason and remedy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from isthmus.errors import RecipeError
from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import OUT, Case, assert_mended, changed, least, name_of, refused

RECIPES = Path(__file__).parents[3] / "recipes"
LEAST = least("ab")
Change = Callable[[dict[str, Any]], object]


def values_with(key: str, value: object) -> dict[str, Any]:
    """The least recipe with one key changed."""
    return changed(LEAST, {key: value})


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_read_and_written_again(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.read(path)
    (tmp_path / "again.toml").write_text(recipe.toml(), encoding="utf-8")
    assert Recipe.read(tmp_path / "again.toml") == recipe


def test_the_minimal_recipe_says_little_more_than_it_must() -> None:
    text = (RECIPES / "minimal.toml").read_text(encoding="utf-8")
    assert sum(1 for line in text.splitlines() if " = " in line.partition("#")[0]) <= 10
    recipe = Recipe.read(RECIPES / "minimal.toml")
    assert [silo.name for silo in recipe.silo] == ["north", "south"]
    assert recipe.train.evaluates_after(recipe.train.rounds)


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
        ("train.rounds", -1),
        ("train.steps", -3),
        ("train.batch", math.inf),
        ("train.optimizer", "adam"),
        ("train.learning_rate", 0),
        ("train.learning_rate", math.inf),
        ("train.learning_rate", True),
        ("train.evaluate", 0),
        ("train.evaluate", "sometimes"),
        ("train.evaluate", 1.5),
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
        ("silo.0.train", 3),
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
    ],
)
def test_a_missing_key_is_named(drop: Change, key: str) -> None:
    values = copy.deepcopy(LEAST)
    drop(values)
    error = refused(values)
    assert error.message == f"the key {key!r} is missing"
    assert error.remedy == f"add {key} to the recipe"


def test_a_whole_number_may_stand_for_a_fraction() -> None:
    assert Recipe.of(values_with("lora.alpha", 16)).lora.alpha == 16.0


@pytest.mark.parametrize("content", [b"seed = ", b"[model\n", b"seed = 1\nseed = 2"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.toml is not TOML") as caught:
        Recipe.read(tmp_path / "r.toml")
    assert caught.value.remedy == "correct the line it names"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("absent.toml", "check the path"),
        (".", "name the file; a run in that folder is continued with 'isthmus run {}'"),
    ],
)
def test_a_file_that_is_not_there(tmp_path: Path, name: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe") as caught:
        Recipe.read(tmp_path / name)
    assert str(tmp_path) in caught.value.message
    assert caught.value.remedy == remedy.format(f"--resume {tmp_path}")


def test_toml_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.of(LEAST).anchored(tmp_path)
    path = tmp_path / "again.toml"
    for one in (recipe, recipe.model_copy(update={"threads": 3})):
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
    assert [silo.train for silo in recipe.silo] == [(f"{folder}/a.jsonl",), (f"{folder}/b.jsonl",)]
    assert [silo.held_out for silo in recipe.silo] == [("/data/h.jsonl",), None]


@pytest.mark.parametrize(
    ("path", "anchored"),
    [("org/name", "org/name"), ("./x", "{}/x"), ("/models/x", "/models/x"), ("here", "{}/here"), ("~/x", "{home}/x")],
)
def test_a_model_path_is_a_folder_or_a_hub_id(tmp_path: Path, path: str, anchored: str) -> None:
    (tmp_path / "here").mkdir()
    recipe = Recipe.of(values_with("model.path", path)).anchored(tmp_path)
    assert recipe.model.path == anchored.format(tmp_path, home=Path.home())


def test_party() -> None:
    recipe = Recipe.of(LEAST)
    assert recipe.party("b") is recipe.silo[1]
    with pytest.raises(RecipeError, match="no silo 'c'") as caught:
        recipe.party("c")
    assert caught.value.remedy == "use one of: a, b"


def test_a_misspelt_section_is_named_before_the_one_that_is_missing() -> None:
    error = refused({"modle": {"path": "org/name"}, "silo": [{"name": "a", "train": "a.jsonl"}]})
    assert error.message == "unknown key 'modle'"
    assert error.remedy.startswith("did you mean 'model'?")


def test_a_rank_of_a_silo_keeps_the_adapters_scale() -> None:
    asked = {"silo.0.rank": 4, "federation.lora": "svd", "lora": {"rank": 8, "alpha": 12.0}}
    recipe = Recipe.of(changed(LEAST, asked))
    own = recipe.of_silo("a")
    assert (own.lora.rank, own.lora.alpha, recipe.of_silo("b")) == (4, 6.0, recipe)


def test_a_silo_has_its_own_steps_or_the_recipes() -> None:
    asked = {"silo.0.steps": 2, "silo.2.steps": 30, "train.steps": 7}
    recipe = Recipe.of(changed(least("abc"), asked))
    assert [recipe.steps(name) for name in ("a", "b", "c", "unheard-of")] == [2, 7, 30, 7]
    assert recipe.mean_reach(1) == 13.0


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.bottom", 0, "1 or more"),
        ("model.bottom", 2.5, "a whole number"),
        ("lora.alpha", 0.0, "more than 0"),
        ("lora.alpha", "16", "a number"),
        ("lora.alpha", math.nan, "a finite number"),
        ("lora.targets", [], "a list of 1 or more"),
        ("lora.targets", "q_proj", "a list"),
        ("model", "folder", "a table"),
        ("silo", {"name": "a"}, "a list"),
        ("trunk.device", "gpu", "'cpu', 'cuda', 'cuda:1' or 'auto'"),
        ("silo.0.name", "A", "1 to 63 lower-case letters, digits, '-' and '_', beginning with a letter or digit"),
        ("sensitivity.region", "usa", "a country's two capital letters"),
        ("train.evaluate", "often", "true or false, or 'end' or 'best', or a whole number"),
        ("train.evaluate", 0, "true or false, or 'end' or 'best', or 1 or more"),
        ("train.micro_batches", 65, "64 or less"),
        ("federation.robust.malicious", 0.5, "less than 0.5"),
        ("federation.lora", "x", "'frozen-a', 'alternating', 'svd' or 'plain'"),
        ("silo.0.train", 3, "a list"),
        ("silo.0.train", [], "a list of 1 or more"),
        ("silo.0.train", "", "a text that is not empty"),
        ("silo.0.train", ["a.jsonl", 3], "a text in quotes"),
        ("sensitivity.classes", {"high": 3}, "a table"),
    ],
)
def test_a_wrong_value_names_what_is_expected(key: str, value: object, expected: str) -> None:
    assert refused(values_with(key, value)).message.endswith(f": expected {expected}")


def test_a_recipe_may_begin_with_a_byte_order_mark_but_must_be_utf_8(tmp_path: Path) -> None:
    text = Path("recipes/minimal.toml").read_text(encoding="utf-8")
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / f"{encoding}.toml").write_text(text, encoding=encoding)
    plain, marked = (Recipe.read(tmp_path / f"{encoding}.toml") for encoding in ("utf-8", "utf-8-sig"))
    assert plain == marked
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "other.toml").write_text(f"# ü\n{text}", encoding=encoding)
        with pytest.raises(RecipeError, match=r"other\.toml is not UTF-8 text") as caught:
            Recipe.read(tmp_path / "other.toml")
        assert caught.value.remedy == "save the file as UTF-8"


SUMMED = {"federation.secure": True, "federation.weights": "equal", "federation.clip": {"norm": 1.0}}
NEEDS_ROUNDS: list[Case] = [
    (
        {**SUMMED, "train.rounds": 0, "federation.noise": {"epsilon": 8.0}},
        "federation.noise: with train.rounds = 0 there is no sum",
        "leave federation.noise out",
        {"federation.noise": OUT, "federation.clip": OUT},
    ),
    (
        {"train.rounds": 0, "train.epochs": 2},
        "train.epochs: nothing trains with train.rounds = 0",
        "leave epochs out",
        {"train.epochs": OUT},
    ),
    (
        {"silo.0.train": OUT},
        "silo.train: 'a' has no rows",
        "or set train.rounds = 0, for inference only",
        {"train.rounds": 0},
    ),
]


@pytest.mark.parametrize("case", NEEDS_ROUNDS, ids=name_of)
def test_what_needs_rounds_is_refused(case: Case) -> None:
    assert_mended(case)


def test_without_rounds_no_rows_are_needed_and_none_are_measured() -> None:
    values = changed(least(), {"train": {"rounds": 0}, **{f"silo.{number}.train": OUT for number in range(3)}})
    recipe = Recipe.of(values)
    assert recipe.train.evaluate is None
    assert not recipe.train.evaluates_after(0)
    assert not recipe.train.keeps(0)
    assert recipe.most_weight(["a"]) > 0
    for when in ("best", "end", True, 3):
        assert not Recipe.of(changed(values, {"train.evaluate": when})).train.evaluates_after(0)
