"""Spans become classes of tokens; the silo's own function is checked; the average of the noise is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import DataError, RecipeError
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import SensitivitySection

CLASSES = {"high": {"noise": 4.0, "epsilon": 2.0}, "low": {"noise": 0.5}, "middle": {"noise": 2.0, "epsilon": 3.0}}
LOW, MIDDLE, HIGH = 1, 2, 3


def sensitivity(**section: Any) -> Sensitivity:
    return Sensitivity(SensitivitySection.model_validate({"classes": CLASSES, **section}))


def own(tmp_path: Path, body: str) -> Sensitivity:
    """With a function of the silo, ``def look(text): ...``."""
    path = tmp_path / "mine.py"
    path.write_text(f"def look(text):\n    {body}\n")
    return sensitivity(function=f"{path}:look")


def test_classes_are_numbered_from_the_least_noise_to_the_most() -> None:
    one = sensitivity()
    assert one.names == ("normal", "low", "middle", "high")
    assert one.weights.tolist() == [1.0, 0.5, 2.0, 4.0]
    assert one.aversions.tolist() == [0.0, 0.0, 2.0, 4.0]


def test_a_class_called_normal_weighs_what_nothing_is_said_of() -> None:
    one = sensitivity(classes={"normal": {"noise": 3.0, "epsilon": 7.0}, "high": {"noise": 4.0}})
    assert one.weights[0] == 3.0
    assert one.epsilon([0]) == 7.0
    assert one.aversions.tolist() == [0.0, 0.0, 4.0]


def test_a_token_has_the_class_with_most_noise_of_those_it_shares_a_character_with() -> None:
    offsets = [(0, 2), (2, 5), (5, 5), (5, 8), (8, 9)]
    spans = [(0, 3, "low"), (4, 6, "high"), (2, 6, "middle"), (8, 8, "high")]
    assert sensitivity().classes("abcdefghi", offsets, spans) == [LOW, HIGH, 0, HIGH, 0]


def test_detectors_fields_and_function_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def look(text):\n    yield (0, 1, 'low')\n")
    one = sensitivity(detectors={"email": "high"}, function=f"{path}:look")
    assert one.classes("ab a@b.org", [(0, 1), (1, 2), (3, 10)], [(1, 2, "middle")]) == [LOW, MIDDLE, HIGH]


def test_a_function_of_a_module_is_found() -> None:
    assert sensitivity(function="tests.unit.privacy.test_sensitivity:first_letter").classes("ab", [(0, 1)]) == [HIGH]


def first_letter(text: str) -> list[tuple[int, int, str]]:
    return [(0, 1, "high")]


def test_the_budget_is_the_smallest_of_all_classes() -> None:
    one = sensitivity()
    assert one.epsilon([0, LOW]) == math.inf
    assert one.epsilon([0, MIDDLE, LOW]) == 3.0
    assert one.epsilon([HIGH, MIDDLE]) == 2.0
    assert one.epsilon([]) == math.inf


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1), st.lists(st.floats(0.01, 100), min_size=3, max_size=3))
def test_weights_over_their_root_mean_square_keep_the_average_power(tokens: list[int], noises: list[float]) -> None:
    one = sensitivity(classes={f"c{n}": {"noise": noise} for n, noise in enumerate(noises)})
    factors = one.weights[tokens].double() / one.root_mean_square(tokens)
    assert float((factors**2).mean()) == pytest.approx(1.0)


def test_no_tokens_scale_nothing() -> None:
    assert sensitivity().root_mean_square([]) == 1.0


@pytest.mark.parametrize(
    "body",
    [
        "raise KeyError('x')",
        "raise SystemExit(0)",
        "return 3",
        "return None",
        "return [3]",
        "return [(0, 1)]",
        "return [(0, 1, 'high', 2)]",
        "return [(0, 99, 'high')]",
        "return [(-1, 1, 'high')]",
        "return [(2, 1, 'high')]",
        "return [(0, 1, 'high'), (1, 4, 'low')]",
        "return {'high': (0, 1)}",
        "return [(0, 1, 'hihg')]",
        "return [(0, 1, 3)]",
        "return [(0, 1, [])]",
        "return [(0.0, 1, 'high')]",
        "return [(False, True, 'high')]",
        "yield (0, 1, 'high'); raise ValueError('late')",
        "return 'abc'",
        "return look(text)",
    ],
)
def test_a_function_that_raises_or_returns_nonsense_is_named(tmp_path: Path, body: str) -> None:
    with pytest.raises(DataError, match=r"mine\.py:look") as caught:
        own(tmp_path, body).classes("abc", [(0, 3)])
    assert caught.value.remedy


@pytest.mark.parametrize("spans", ["[]", "()", "iter([[0, 3, 'high']])", "[(3, 3, 'low')]"])
def test_any_iterable_of_spans_will_do(tmp_path: Path, spans: str) -> None:
    assert own(tmp_path, f"return {spans}").classes("abc", [(0, 3)]) in ([0], [HIGH])


def test_spans_of_a_function_may_overlap(tmp_path: Path) -> None:
    """Noise is never too little for it: where they do, the class with the most noise holds."""
    one = own(tmp_path, "return [(0, 3, 'high'), (1, 2, 'low'), (2, 5, 'middle'), (0, 3, 'high')]")
    assert one.classes("abcde", [(0, 1), (1, 2), (2, 3), (3, 5)]) == [HIGH, HIGH, HIGH, MIDDLE]


def missing_module(tmp_path: Path) -> str:
    return "no.such.module:look"


def missing_file(tmp_path: Path) -> str:
    return f"{tmp_path}/none.py:look"


def missing_name(tmp_path: Path) -> str:
    return "math:look"


def no_function(tmp_path: Path) -> str:
    return "math:pi"


def broken_file(tmp_path: Path) -> str:
    (tmp_path / "bad.py").write_text("def look(:\n")
    return f"{tmp_path}/bad.py:look"


def leaving_file(tmp_path: Path) -> str:
    (tmp_path / "bye.py").write_text("raise SystemExit(0)\n")
    return f"{tmp_path}/bye.py:look"


@pytest.mark.parametrize("target", [missing_module, missing_file, missing_name, no_function, broken_file, leaving_file])
def test_a_function_that_is_not_there_is_refused(tmp_path: Path, target: Callable[[Path], str]) -> None:
    with pytest.raises(RecipeError, match=r"sensitivity\.function") as caught:
        sensitivity(function=target(tmp_path))
    assert caught.value.remedy


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_an_unreadable_file_of_names_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="names"):
        sensitivity(detectors=["name"], names=str(path))


def test_names_of_a_file_are_found(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("Ö\nxyz\n", encoding="utf-8")
    one = sensitivity(detectors={"name": "low"}, names=str(path))
    assert one.classes("an ö is xyz", [(0, 2), (3, 4), (5, 7), (8, 11)]) == [0, LOW, 0, LOW]
