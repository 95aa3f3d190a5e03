"""The demo's recipe: which rows its silos train on, and which they are measured on."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.demo import play
from isthmus.demo.assets import SILO_MEMBERS, SiloFiles
from tests.conftest import make_recipe, save_tiny_model, write_rows


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hutto(cache: Path, *, rows: int, held_out: int, seed: int) -> dict[str, SiloFiles]:
        return {name: SiloFiles(cache / f"{name}-{rows}", cache / f"{name}-{held_out}") for name in SILO_MEMBERS}

    monkeypatch.setattr(play, "hutto", hutto)
    monkeypatch.setattr(play, "smollm2", lambda cache: cache / "model")


def test_silos_train_on_few_rows_and_are_measured_on_others(tmp_path: Path) -> None:
    recipe = play.demo_recipe(tmp_path, quick=False, seed=7)
    assert recipe.seed == 7
    for silo in recipe.silo:
        assert silo.train == (str(tmp_path / f"{silo.name}-{play.TRAIN_ROWS}"),)
        assert silo.held_out == (str(tmp_path / f"{silo.name}-{play.HELD_OUT_ROWS}"),)


def test_quick_has_fewer_rounds(tmp_path: Path) -> None:
    quick, whole = (play.demo_recipe(tmp_path, quick=quick, seed=1) for quick in (True, False))
    assert quick.train.rounds == play.QUICK_ROUNDS < whole.train.rounds


def test_majority_is_of_held_out_rows(tmp_path: Path) -> None:
    files = {}
    for kind, labels in (("train", "AAAA"), ("held_out", "ABBB")):
        rows = [{"text": f"w{number + 4}", "label": f"w{9 if one == 'A' else 8}"} for number, one in enumerate(labels)]
        files[kind] = str(write_rows(tmp_path / f"{kind}.jsonl", rows))
    recipe = make_recipe(
        save_tiny_model("llama", tmp_path / "tiny"),
        task={"prompt": "{text}", "answer": "{label}", "choices": ["w8", "w9"]},
        silo=[{"name": "a", **files}],
    )
    assert play._majority(recipe) == {"a": 0.75}
