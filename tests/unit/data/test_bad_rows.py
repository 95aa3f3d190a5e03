"""Errors of rows, collected into one that names the first and counts the rest."""

from __future__ import annotations

import pytest

from isthmus.data.bad_rows import NAMED, BadRows
from isthmus.errors import DataError, RecipeError


def collected(count: int) -> BadRows:
    bad = BadRows()
    for number in range(1, count + 1):
        with bad.collecting():
            raise DataError(f"f:{number} is bad", remedy=f"mend {number}")
    return bad


def test_nothing_is_raised_for_nothing() -> None:
    bad = BadRows()
    with bad.collecting():
        pass
    bad.raise_any()
    assert bad.count == 0


def test_one_is_raised_as_it_is() -> None:
    with pytest.raises(DataError, match=r"^f:1 is bad\n  remedy: mend 1$"):
        collected(1).raise_any()


@pytest.mark.parametrize("count", [2, NAMED, NAMED + 1, 1000])
def test_many_are_counted_and_the_first_named(count: int) -> None:
    with pytest.raises(DataError) as caught:
        collected(count).raise_any()
    said = caught.value.message
    assert said.startswith(f"{count} rows or files are unusable: f:1 is bad; f:2 is bad")
    assert said.count(" is bad") == min(count, NAMED)
    assert said.endswith(f"and {count - NAMED} more") == (count > NAMED)
    assert caught.value.remedy == "mend 1"


def test_other_errors_are_not_collected() -> None:
    bad = BadRows()
    with pytest.raises(RecipeError), bad.collecting():
        raise RecipeError("other", remedy="none")
    assert bad.count == 0
