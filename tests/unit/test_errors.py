"""The error tree: stable unique codes, remedies, and a docstring that draws exactly the classes there are."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import grpc
import pytest

from isthmus import errors
from isthmus.errors import IsthmusError, by_code

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, IsthmusError)]


def drawn() -> dict[str, str]:
    """Name to parent, as the docstring's tree has them."""
    found: dict[str, str] = {}
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^    (?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w*(Error|Exhausted))\b", line):
            depth = len(match["branch"]) // 4
            above[depth] = match["name"]
            found[match["name"]] = above[depth - 1] if depth else "Exception"
    return found


def test_the_docstring_draws_exactly_the_tree() -> None:
    assert drawn() == {kind.__name__: kind.__mro__[1].__name__ for kind in CLASSES}


def test_codes_are_unique_and_name_their_class() -> None:
    codes = [kind.code for kind in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)
    assert [by_code(code) for code in codes] == CLASSES


def test_a_code_of_a_later_version_is_the_base_class() -> None:
    assert by_code("not-yet-known") is IsthmusError


@pytest.mark.parametrize("kind", CLASSES)
def test_each_error_says_what_happened_and_what_to_do(kind: type[IsthmusError]) -> None:
    error = kind("it broke", remedy="mend it")
    assert (error.message, error.remedy) == ("it broke", "mend it")
    assert str(error) == "it broke\n  remedy: mend it"
    assert isinstance(kind.status, grpc.StatusCode)
    assert kind.status is not grpc.StatusCode.OK
    with pytest.raises(TypeError):
        kind("no remedy")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        kind("no keyword", "mend it")  # type: ignore[call-arg, misc]


@pytest.mark.parametrize("kind", CLASSES)
def test_errors_survive_pickle_and_copy(kind: type[IsthmusError]) -> None:
    error = kind("it broke", remedy="mend it")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert (other.message, other.remedy, str(other)) == (error.message, error.remedy, str(error))
