"""Partitions: each row to one silo, the same for a seed, and shares as the distribution has them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.bad_rows import BadRows
from isthmus.data.examples import check_examples, silo_examples
from isthmus.data.partitions import divide, divided
from isthmus.errors import DataError
from isthmus.recipe import PartitionSection, Recipe
from tests.conftest import make_recipe, write_rows

NAMES = ["a", "b", "c", "d"]
ANOTHER_PROCESS = """
import sys
from pathlib import Path
from isthmus.data.partitions import divided
from isthmus.recipe import Recipe
for silo, part in divided(Recipe.read(Path(sys.argv[1]))).items():
    print(silo, [row.place.rpartition(":")[2] for row in (*part.train, *part.held_out)])
"""


def section(**keys: Any) -> PartitionSection:
    return PartitionSection.model_validate({"data": "none", **keys})


def recipe(folder: Path, rows: int = 60, *, silos: int = 4, **partition: Any) -> Recipe:
    texts = [{"text": f"w{number}", "label": "xyz"[number % 3]} for number in range(rows)]
    data = str(write_rows(folder / "all.jsonl", texts))
    silo = [{"name": name} for name in NAMES[:silos]]
    task = {"prompt": "{text}", "answer": "{label}"}
    return make_recipe(Path("none"), silo=silo, task=task, partition={"data": data, **partition})


BY = [{"by": "iid"}, {"by": "quantity"}, {"by": "dirichlet", "field": "label"}, {"by": "field", "field": "label"}]


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(BY),
    st.lists(st.sampled_from("vwxyz"), min_size=8, max_size=80),
    st.integers(1, 4),
    st.floats(0.05, 100),
    st.integers(0, 2**32),
)
def test_each_row_goes_to_exactly_one_silo(
    by: dict[str, str], values: list[str], silos: int, alpha: float, seed: int
) -> None:
    chosen = section(**by, alpha=alpha)
    parts = []
    with nullcontext() if chosen.by == "iid" else suppress(DataError):
        parts = divide(chosen, len(values), values if chosen.field else [], NAMES[:silos], np.random.default_rng(seed))
    if not parts:
        return
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(values)))
    assert len(parts) == silos
    assert all(len(part) for part in parts)
    if chosen.by == "iid":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if chosen.by == "field":
        owners = Counter(value for part in parts for value in {values[index] for index in part})
        assert set(owners.values()) == {1}


@pytest.mark.parametrize("by", BY[:3], ids=lambda by: by["by"])
def test_a_seed_fixes_the_parts_in_every_process(by: dict[str, str], tmp_path: Path) -> None:
    def parts(**keys: Any) -> dict[str, list[str]]:
        found = divided(recipe(tmp_path, held_out=0.25, **by, **keys))
        return {name: [row.place.rpartition(":")[2] for row in (*p.train, *p.held_out)] for name, p in found.items()}

    first = parts()
    assert parts() == parts(seed=0) == first
    assert parts(seed=1) != first
    path = tmp_path / "recipe.toml"
    path.write_text(recipe(tmp_path, held_out=0.25, **by).toml())
    told = subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS, str(path)], capture_output=True, text=True, check=True
    )
    assert told.stdout.splitlines() == [f"{name} {places}" for name, places in first.items()]


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_shares_have_the_distributions_mean_and_variance(alpha: float) -> None:
    """Of Dir(α·1) over n silos: mean 1/n, variance (1/n)(1 - 1/n)/(nα + 1). 300 groups of 400 rows, four standard
    errors; rounding to whole rows adds less than that."""
    groups, size, silos = 300, 400, 4
    values = [f"{number:03}" for number in range(groups) for _ in range(size)]
    parts = divide(
        section(by="dirichlet", field="x", alpha=alpha), len(values), values, NAMES, np.random.default_rng(5)
    )
    shares = np.stack([np.bincount(np.asarray(part) // size, minlength=groups) for part in parts]) / size
    expected = (1 / silos) * (1 - 1 / silos) / (silos * alpha + 1)
    assert np.allclose(shares.sum(axis=0), 1)
    assert np.abs(shares.mean(axis=1) - 1 / silos).max() < 4 * np.sqrt(expected / groups)
    assert shares.var(axis=1) == pytest.approx(np.full(silos, expected), rel=0.4)


def test_groups_go_to_the_silos_of_their_names_or_where_there_is_least() -> None:
    named = ["b", "a", "b", "a", "a"]
    parts = divide(section(by="field", field="x"), 5, named, ["a", "b"], np.random.default_rng(0))
    assert [part.tolist() for part in parts] == [[1, 3, 4], [0, 2]]
    other = ["p"] * 5 + ["q"] * 3 + ["r"] * 3 + ["s"]
    parts = divide(section(by="field", field="x"), 12, other, ["a", "b"], np.random.default_rng(0))
    assert [[other[index] for index in part] for part in parts] == [["p"] * 5 + ["s"], ["q"] * 3 + ["r"] * 3]


@pytest.mark.parametrize(
    ("keys", "values", "told"),
    [
        ({}, ["x"], "1 rows for 4 silos"),
        ({"by": "field", "field": "x"}, ["x"] * 9, "1 values for 4 silos"),
        ({"by": "dirichlet", "field": "x", "alpha": 0.001}, ["x"] * 9, "alpha = 0.001 a silo has no row"),
        ({"by": "quantity", "alpha": 0.001}, ["x"] * 9, "alpha = 0.001 a silo has no row"),
    ],
)
def test_a_silo_without_a_row_is_refused(keys: dict[str, Any], values: list[str], told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        divide(section(**keys), len(values), values, NAMES, np.random.default_rng(0))
    assert caught.value.remedy


def test_a_share_of_each_silos_rows_is_held_out(tmp_path: Path) -> None:
    parts = divided(recipe(tmp_path, held_out=0.2)).values()
    assert [(len(part.train), len(part.held_out)) for part in parts] == [(12, 3)] * 4
    places = [row.place for part in parts for row in (*part.train, *part.held_out)]
    assert len(set(places)) == 60
    small = divided(recipe(tmp_path, 4, held_out=0.9)).values()
    assert [(len(part.train), len(part.held_out)) for part in small] == [(1, 0)] * 4


def test_rows_without_a_value_are_counted(tmp_path: Path) -> None:
    read = recipe(tmp_path, by="dirichlet", field="label")
    with (tmp_path / "all.jsonl").open("a") as file:
        file.write('{"text": "w"}\n{"text": "w", "label": null}\n{"text": "w", "label": ["x"]}\n')
    with pytest.raises(DataError, match=r"^3 rows .*all\.jsonl:61 has no value to divide by in 'label'"):
        check_examples(read)


def test_silos_read_their_parts_by_their_own_columns(tmp_path: Path) -> None:
    data = str(write_rows(tmp_path / "all.jsonl", [{"note": f"w{n}", "kind": "yes"} for n in range(4, 12)]))
    own = str(write_rows(tmp_path / "own.jsonl", [{"text": "own", "label": "yes"}]))
    columns = {"text": "note", "label": "kind"}
    silo = [{"name": "a", "columns": columns}, {"name": "b", "train": own}, {"name": "c", "columns": columns}]
    task = {"prompt": "{text}", "answer": "{label}"}
    read = make_recipe(Path("none"), silo=silo, task=task, partition={"data": data})
    texts = [[example.prompt for _, example in silo_examples(one, read, BadRows())[0]] for one in read.silo]
    assert texts[1] == ["own"]
    assert sorted(texts[0] + texts[2]) == sorted(f"w{n}" for n in range(4, 12))
    check_examples(read)
