"""``[partition]``: a field where one is needed, and paths made absolute."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from isthmus.recipe import PartitionSection


@pytest.mark.parametrize(
    "keys",
    [
        {"by": "dirichlet"},
        {"by": "field"},
        {"by": "iid", "field": "x"},
        {"by": "quantity", "field": "x"},
        {"alpha": 0.0},
    ],
)
def test_what_does_not_fit_is_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PartitionSection.model_validate({"data": "a.csv", **keys})


def test_paths_are_made_absolute_and_sets_are_not() -> None:
    section = PartitionSection.model_validate({"data": ["a.csv", "datasets:x/y:train"]})
    assert section.anchored(lambda path: str(Path("/r") / path)).data == ("/r/a.csv", "datasets:x/y:train")
