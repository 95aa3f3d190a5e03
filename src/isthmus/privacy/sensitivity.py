"""How sensitive text is, word by word, and what follows from it for the noise and the budget.

Classes are numbers here: 0 for text of which nothing is said, then the recipe's classes, from the least noise up.
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

Span = tuple[int, int, str]
"""A stretch of a text, from character to character, and its class."""
Offsets = Sequence[tuple[int, int]]
"""Of each token, the characters it stands for."""


class Sensitivity:
    """What a recipe's section finds sensitive.

    Raises:
        RecipeError: the function cannot be found.
        DataError: the file of names cannot be read.
    """

    def __init__(self, section: SensitivitySection) -> None:
        self.section = section
        named = sorted(section.classes.items(), key=lambda item: (item[1].noise, -(item[1].epsilon or float("inf"))))
        self.names = (NORMAL, *(name for name, _ in named))
        """Of the classes, by number. One that the recipe calls normal, too, has two numbers."""
        settings = [section.classes.get(NORMAL, SensitivityClass()), *(one for _, one in named)]
        self.weights = torch.tensor([one.noise for one in settings])
        """Noise of each class, up to a common factor."""
        self.aversions = torch.where(self.weights > self.weights[0], self.weights, 0.0)
        """How much less attention each class's tokens get, up to a common factor."""
        self._epsilons = [one.epsilon or float("inf") for one in settings]
        self._numbers = {name: number for number, name in enumerate(self.names)}
        listed = _listed(section.names)
        self._detectors = [
            (detectors.build(name, region=section.region, listed=listed), kind)
            for name, kind in section.detectors.items()
        ]
        self._function = None if section.function is None else _import(section.function)

    def classes(self, text: str, offsets: Offsets, spans: Iterable[Span] = ()) -> list[int]:
        """The class of each token: of the spans that share a character with it, the one with the most noise.

        Args:
            offsets: a token that stands for no character has class 0.
            spans: what is known of the text beside what is found in it.

        Raises:
            DataError: the silo's own function raised, or returned nonsense.
        """
        found = [*((start, end, self._numbers[kind]) for start, end, kind in spans), *self._found(text)]
        if not found:
            return [0] * len(offsets)
        classes = [0] * len(text)
        for start, end, number in sorted(found, key=lambda span: span[2]):
            classes[start:end] = [number] * (end - start)
        return [max(classes[start:end], default=0) for start, end in offsets]

    def epsilon(self, classes: Iterable[int]) -> float:
        """Budget of a record that holds tokens of these classes; infinite if none has one."""
        return min((self._epsilons[number] for number in set(classes)), default=float("inf"))

    def root_mean_square(self, tokens: Iterable[int]) -> float:
        """Of the classes' weights over tokens of these classes; 1 if there are none."""
        counts = torch.bincount(torch.tensor(list(tokens), dtype=torch.long), minlength=len(self.names)).double()
        if not counts.sum():
            return 1.0
        return float(((counts * self.weights.double() ** 2).sum() / counts.sum()).sqrt())

    def _found(self, text: str) -> list[tuple[int, int, int]]:
        found = [(start, end, self._numbers[kind]) for detect, kind in self._detectors for start, end in detect(text)]
        return found if self._function is None else [*found, *self._told(self._function, text)]

    def _told(self, function: Callable[[str], Any], text: str) -> list[tuple[int, int, int]]:
        """What the silo's own function says, checked."""
        name = self.section.function
        try:
            spans = list(function(text))
        except IsthmusError:
            raise
        except (Exception, SystemExit) as error:  # it is the user's: anything may happen
            raise DataError(
                f"the sensitivity function {name} failed: {type(error).__name__}: {error}",
                remedy="correct it, so that it returns (start, end, class) spans for any text",
            ) from error
        return [self._checked(span, len(text)) for span in spans]

    def _checked(self, span: Any, length: int) -> tuple[int, int, int]:
        fits = isinstance(span, tuple | list) and len(span) == 3 and all(type(place) is int for place in span[:2])
        if fits and 0 <= span[0] <= span[1] <= length and isinstance(span[2], str) and span[2] in self._numbers:
            return span[0], span[1], self._numbers[span[2]]
        raise DataError(
            f"the sensitivity function {self.section.function} gave {span!r} for a text of {length} characters",
            remedy=f"return (start, end, class) with 0 ≤ start ≤ end ≤ {length} and one of: {', '.join(self.names)}",
        )


def _listed(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the file of names {path}: {error}", remedy="correct sensitivity.names; the file is UTF-8"
        ) from error


def _import(target: str) -> Callable[[str], Any]:
    """The silo's own function."""
    place, _, name = target.rpartition(":")
    try:
        module = _run_file(place) if place.endswith(".py") else importlib.import_module(place)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise RecipeError(
            f"sensitivity.function: cannot import {target}: {type(error).__name__}: {error}",
            remedy="write 'module:name' or 'file.py:name' of a function that this silo has",
        ) from error
    if not callable(function):
        raise RecipeError(f"sensitivity.function: {target} is no function", remedy="name a function of one text")
    return function  # type: ignore[no-any-return]


def _run_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
