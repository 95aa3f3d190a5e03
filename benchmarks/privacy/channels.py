"""Boundaries from nothing but noise to all that a narrow crossing can tell, and what the attacks find through each.

An attack's figure at the private recipe means something only if the same attacks find more where more crosses. So the
rungs rise in capacity, on the same rows, and each has every attack that applies and identification among candidates,
which measures what the channel tells whatever it takes to find a text from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.results import DEVICE, Results
from isthmus.attacks.score import share
from isthmus.audit.attack import AttackPlan, run_attacks
from isthmus.audit.judge import AttackResult
from isthmus.audit.target import Target
from isthmus.privacy.detokenizer import Detokenizer
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import Recipe, SensitivitySection
from isthmus.recipe.sections.sensitivity import DETECTED, DETECTORS
from isthmus.silo.join import load_tokenizer

Values = dict[str, Any]
FEW = 20
"""Sensitive tokens below which their share says nothing."""
TEXT_BOUND, BOUND = 0.20, 0.10
"""Of text tokens and of sensitive tokens, at most, by the private recipe."""
CLEAN: Values = {"forward": {"clip": 1.0, "noise": 0.0}}


@dataclass(frozen=True)
class Rung:
    """A boundary, as a change of the private recipe's, and the attacks that apply."""

    name: str
    changed: Values
    attacks: tuple[str, ...] = ("search", "decoder")
    few: bool = False
    """The attacks on text get only so many victim rows that slow ones end; identification gets all."""


@dataclass(frozen=True)
class Size:
    """Number of rows."""

    victims: int = 60
    few: int = 8
    own: int = 3000
    """Of the adversary: the colluder's first, then public ones."""
    candidates: int = 1000
    public: Path | None = field(default=None)


RUNGS = (
    Rung("nothing but noise", {"forward": {"clip": 1.0, "noise": 1e6}}),
    Rung("private recipe", {}),
    Rung("last position, 4 clean numbers", CLEAN, ("search",), few=True),
    Rung("last position, 576 clean numbers, untrained", {"width": None, **CLEAN}, ("search",), few=True),
    Rung("every token, 4 clean numbers", {"tail": None, **CLEAN}, ("linear", "decoder", "matching"), few=True),
)


def climb(results: Results, source: Target, size: Size, rungs: Sequence[Rung] = RUNGS, task: str = "") -> None:
    """Attack each rung and note attack by attack, the best, and identification; ``task`` begins each measure's name."""
    for rung in rungs:
        name = f"{task}{rung.name}"
        # Where another width crosses, what was trained has another shape: there the parts are as they start.
        run = None if "width" in rung.changed else source.run
        changed = Target(changed_boundary(source.recipe, rung.changed), run)
        detected = Detected(source.recipe)
        found = tried(changed, rung, size, detected)
        bound = None if rung.changed else TEXT_BOUND
        note_text(results, name, [one for one in found if one.tokens == "text"], bound)
        for one in found:
            if one.tokens == "candidates":
                note_identified(results, name, one)
        if not rung.changed:
            note_sensitive(results, name, [one for one in found if one.tokens == "sensitive"], detected)


class Detected:
    """Which tokens of a row are identifiers, names or dates by the recipe's detectors, all of them; counts them."""

    def __init__(self, recipe: Recipe) -> None:
        section = {"detectors": list(DETECTORS), "classes": {DETECTED: {"noise": 2.0}}}
        self._sensitivity = Sensitivity(SensitivitySection.model_validate(section))
        self._tokenizer = load_tokenizer(Path(recipe.model.path))
        self._masks: dict[tuple[int, ...], list[bool]] = {}

    @property
    def count(self) -> int:
        return sum(map(sum, self._masks.values()))

    def __call__(self, row: Sequence[int]) -> list[bool]:
        if tuple(row) not in self._masks:
            reading = Detokenizer(self._sensitivity, self._tokenizer.decode)
            reading.extend(row)
            self._masks[tuple(row)] = [number > 0 for number in reading.classes]
        return self._masks[tuple(row)]


def changed_boundary(recipe: Recipe, changed: Values) -> Recipe:
    values = recipe.model_dump(exclude_none=True)
    values.pop("privacy", None)  # not every rung has a clip and noise
    values["boundary"] |= changed
    values["boundary"] = {key: value for key, value in values["boundary"].items() if value is not None}
    return Recipe.of(values)


def tried(source: Target, rung: Rung, size: Size, detected: Detected) -> list[AttackResult]:
    """By the trunk with a colluding silo, which has the public rows, too."""

    def made(attacks: tuple[str, ...], victims: int) -> list[AttackResult]:
        settings = ("east", "west", victims, size.own, size.public)
        order = AttackPlan(("trunk+silo",), attacks, *settings, candidates=size.candidates, device=DEVICE)
        return run_attacks(source, order, lambda told: print(f"  {told}", flush=True), detected)

    if not rung.few:
        return made((*rung.attacks, "identify"), size.victims)
    return made(rung.attacks, size.few) + made(("identify",), size.victims)


def note_text(results: Results, name: str, found: Sequence[AttackResult], bound: float | None) -> None:
    """Tokens of the text, not of the template."""
    for one in found:
        figure = one.figures["token_accuracy"]
        results.add(f"{name}: text tokens recovered, {one.attack}", figure.value, "share")
        results.add(f"{name}: ROUGE-L, {one.attack}", one.figures["rougeL"].value, "share")
    best = max((one.figures["token_accuracy"] for one in found), key=lambda figure: figure.value)
    results.add(f"{name}: text tokens recovered, best attack", best.value, "share", at_most=bound)
    results.add(f"{name}: text tokens recovered, best attack, upper", best.high, "share")


def note_identified(results: Results, name: str, one: AttackResult) -> None:
    for rank, figure in (("first", one.figures["top1"]), ("among the first ten", one.figures["top10"])):
        results.add(f"{name}: rows named {rank} ({one.notes[0]})", figure.value, "share")
        results.add(f"{name}: rows named {rank}, upper", figure.high, "share")


def note_sensitive(results: Results, name: str, found: Sequence[AttackResult], detected: Detected) -> None:
    """Identifiers, names and dates apart; where there are too few of them, only how many."""
    results.add(f"{name}: sensitive tokens in the rows attacked", detected.count, "tokens")
    if detected.count >= FEW:
        best = max((one.figures["token_accuracy"] for one in found), key=lambda figure: figure.value)
        results.add(f"{name}: sensitive tokens recovered, best attack", best.value, "share", at_most=BOUND)
        # A bootstrap of nothing says nothing: then it is the exact interval of as many tokens.
        upper = best.high if best.value else share([False] * detected.count).high
        results.add(f"{name}: sensitive tokens recovered, best attack, upper", upper, "share")
