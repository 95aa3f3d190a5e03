"""The greeting: shared keys and the model's configuration, for whoever a party connects to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from isthmus.errors import CutMovedError, MismatchError
from isthmus.model.agreement import CONFIG, START, TOKENIZER, agreed_keys, check_agreed, earlier_keys, hello_of
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe.shared import check_shared, shared_keys
from isthmus.wire import frames
from tests.conftest import make_recipe, save_tiny_model, uncut


def test_a_greeting_says_what_must_be_alike(tmp_path: Path) -> None:
    recipe = make_recipe(save_tiny_model("llama", tmp_path))
    hello = hello_of(recipe)
    assert dict(hello.keys) == agreed_keys(recipe) == agreed_keys(recipe, Checkpoint(recipe.model.path))
    assert dict(hello.keys).items() > shared_keys(recipe).items()
    assert (hello.version, hello.bottom, hello.top, hello.fingerprint) == (frames.VERSION, 1, 1, "")
    assert hello.instance != hello_of(recipe).instance
    assert frames.checked(frames.wrap(hello)) == hello


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_the_adapter_to_start_from_counts_by_its_content(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    for name, seed in (("first", 1), ("other", 2)):
        torch.manual_seed(seed)
        settings = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        get_peft_model(uncut(model), settings).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    first, copy, other = (
        agreed_keys(make_recipe(model, lora={"start": str(tmp_path / name)})) for name in ("first", "copy", "other")
    )
    assert first == copy
    for differing in (other, agreed_keys(make_recipe(model))):
        with pytest.raises(MismatchError, match=START):
            check_shared("a", differing, "the root", first)


def test_another_configuration_is_told_without_the_weights(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "model.safetensors").unlink()
    first, second = (agreed_keys(make_recipe(one)) for one in (folder, other))
    assert first == second
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(MismatchError, match=CONFIG):
        check_shared("a", first, "the root", agreed_keys(make_recipe(other)))


def test_tokenizers_are_compared_where_both_have_one(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    other, bare = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("other", "bare"))
    (bare / "tokenizer.json").unlink()
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(tokenizer | {"truncation": None, "padding": None}, indent=1), encoding="utf-8")
    ours, same, none = (agreed_keys(make_recipe(one)) for one in (folder, other, bare))
    assert ours == same
    assert ours.keys() - none.keys() == {TOKENIZER}
    first, second, *_ = vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    swapped = agreed_keys(make_recipe(other))
    with pytest.raises(MismatchError, match=TOKENIZER):
        check_agreed("a", swapped, "the trunk", ours)
    check_agreed("a", swapped, "the trunk", none)
    check_agreed("a", none, "the trunk", ours)


@pytest.mark.parametrize("count", [3, 40])  # the names of many are compared by their digest
def test_who_joined_before_silos_were_added_need_not_know_them(count: int, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    first = tuple(f"silo{number}" for number in range(count))
    recipes = [make_recipe(folder, silos=first + late) for late in ((), ("x",), ("x", "y"))]
    keys = [agreed_keys(recipe) for recipe in recipes]
    earlier = earlier_keys(recipes[2], keys[2], {"x", "y"})
    assert earlier == keys[:2]
    for theirs in keys:
        check_agreed("a", theirs, "the trunk", keys[2], earlier)
    without_first = agreed_keys(make_recipe(folder, silos=first[1:]))
    with_another = agreed_keys(make_recipe(folder, silos=(*first, "z")))
    other = {**keys[0], "seed": "9"}
    for theirs in (without_first, with_another, other):
        with pytest.raises(MismatchError):
            check_agreed("a", theirs, "the trunk", keys[2], earlier)
    with pytest.raises(MismatchError, match=r"silo\.name"):
        check_agreed("a", keys[0], "the trunk", keys[2])  # nobody was added by an authority


def test_a_party_that_has_not_moved_its_cut_yet_is_told_so(tmp_path: Path) -> None:
    moves = {"moves": [{"after": 2, "bottom": 2}]}
    recipe = make_recipe(save_tiny_model("llama", tmp_path), model=moves)
    before, after = agreed_keys(recipe), agreed_keys(recipe.moved_to((2, 1)))
    for theirs, own in ((before, after), (after, before)):
        with pytest.raises(CutMovedError, match="one of them is behind"):
            check_agreed("a", theirs, "the trunk", own)
    with pytest.raises(MismatchError, match=r"seed") as told:
        check_agreed("a", before | {"seed": "7"}, "the trunk", after)
    assert not isinstance(told.value, CutMovedError)
    stays = agreed_keys(make_recipe(Path(recipe.model.path), model={"bottom": 2}))
    with pytest.raises(MismatchError, match=r"model\.bottom") as told:
        check_agreed("a", stays, "the trunk", stays | {"model.bottom": "1"})
    assert not isinstance(told.value, CutMovedError)
