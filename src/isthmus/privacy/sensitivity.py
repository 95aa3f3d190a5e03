"""Sensitivity classes: the class of each token of a text, with the noise, attention and budget of each class.

Classes are numbers here: 0 for ordinary text, then the recipe's classes in order of increasing noise.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from isthmus.errors import DataError, IsthmusError, RecipeError
from isthmus.privacy import detectors
from isthmus.recipe import SensitivityClass, SensitivitySection
from isthmus.recipe.sections.sensitivity import NORMAL

ClassSpan = tuple[int, int, str]
"""Start and end of a span of text in characters, end exclusive, and the name of its class."""
Offsets = Sequence[tuple[int, int]]
"""Start and end of each token in the text, in characters, end exclusive."""


class Sensitivity:
    """The classifier that a recipe's ``[sensitivity]`` section describes.

    Raises:
        RecipeError: ``sensitivity.function`` cannot be imported.
        DataError: the file ``sensitivity.names`` cannot be read.
    """

    def __init__(self, section: SensitivitySection) -> None:
        self.section = section
        named = sorted(section.classes.items(), key=lambda item: (item[1].noise, -(item[1].epsilon or float("inf"))))
        self.names = (NORMAL, *(name for name, _ in named))
        """Name of each class, by number. If the recipe defines the class ``normal``, that name has two numbers."""
        settings = [section.classes.get(NORMAL, SensitivityClass()), *(one for _, one in named)]
        self.weights = torch.tensor([one.noise for one in settings])
        """Relative noise of each class, float32."""
        self.aversions = torch.where(self.weights > self.weights[0], self.weights, 0.0)
        """Relative aversion (reduction of attention logits) of each class, float32; 0 for classes without extra
        noise."""
        self._epsilons = [one.epsilon or float("inf") for one in settings]
        self._numbers = {name: number for number, name in enumerate(self.names)}
        listed = _listed(section.names)
        self._detectors = [
            (detectors.build(name, region=section.region, listed=listed), kind)
            for name, kind in section.detectors.items()
        ]
        self._function = None if section.function is None else _import(section.function)

    def classes(self, text: str, offsets: Offsets, spans: Iterable[ClassSpan] = ()) -> list[int]:
        """The class of each token: the one with the most noise among the spans that overlap the token.

        Args:
            offsets: of each token; a token without characters has class 0.
            spans: spans of known class, in addition to those detected.

        Raises:
            DataError: the silo's own function raised, or returned invalid spans.
        """
        found = [*((start, end, self._numbers[kind]) for start, end, kind in spans), *self._found(text)]
        if not found:
            return [0] * len(offsets)
        classes = [0] * len(text)
        for start, end, number in sorted(found, key=lambda span: span[2]):
            classes[start:end] = [number] * (end - start)
        return [max(classes[start:end], default=0) for start, end in offsets]

    def epsilon(self, classes: Iterable[int]) -> float:
        """Privacy budget of a record with tokens of these classes: the smallest of theirs; infinite if none has one."""
        return min((self._epsilons[number] for number in set(classes)), default=float("inf"))

    def root_mean_square(self, tokens: Iterable[int]) -> float:
        """Root mean square of the weights of tokens of these classes; 1 if there are no tokens."""
        counts = torch.bincount(torch.tensor(list(tokens), dtype=torch.long), minlength=len(self.names)).double()
        if not counts.sum():
            return 1.0
        return float(((counts * self.weights.double() ** 2).sum() / counts.sum()).sqrt())

    def _found(self, text: str) -> list[tuple[int, int, int]]:
        found = [(start, end, self._numbers[kind]) for detect, kind in self._detectors for start, end in detect(text)]
        return found if self._function is None else [*found, *self._user_spans(self._function, text)]

    def _user_spans(self, function: Callable[[str], Any], text: str) -> list[tuple[int, int, int]]:
        """The spans that the silo's own function returns, checked."""
        name = self.section.function
        try:
            spans = list(function(text))
        except IsthmusError:
            raise
        except (Exception, SystemExit) as error:  # user code may raise anything
            raise DataError(
                f"the sensitivity function {name} failed: {type(error).__name__}: {error}",
                remedy="correct the function: it must return (start, end, class) spans for any text",
            ) from error
        return [self._checked(span, len(text)) for span in spans]

    def _checked(self, span: Any, length: int) -> tuple[int, int, int]:
        fits = isinstance(span, tuple | list) and len(span) == 3 and all(type(place) is int for place in span[:2])
        if fits and 0 <= span[0] <= span[1] <= length and isinstance(span[2], str) and span[2] in self._numbers:
            return span[0], span[1], self._numbers[span[2]]
        raise DataError(
            f"the sensitivity function {self.section.function} returned {span!r} for a text of {length} characters",
            remedy=f"return (start, end, class) with 0 ≤ start ≤ end ≤ {length} and one of: {', '.join(self.names)}",
        )


def _listed(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the file of names {path}: {error}",
            remedy="set sensitivity.names to a readable text file in UTF-8, one name a line",
        ) from error


def _import(target: str) -> Callable[[str], Any]:
    """The function that ``sensitivity.function`` names."""
    place, _, name = target.rpartition(":")
    try:
        module = _run_file(place) if place.endswith(".py") else importlib.import_module(place)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:  # importing runs user code
        raise RecipeError(
            f"sensitivity.function: cannot import {target}: {type(error).__name__}: {error}",
            remedy="set it to 'module:name' or 'file.py:name' of a function that this silo can import",
        ) from error
    if not callable(function):
        raise RecipeError(
            f"sensitivity.function: {target} is not a function", remedy="name a function that takes a text"
        )
    return function  # type: ignore[no-any-return]


def _run_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
