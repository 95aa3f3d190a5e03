"""A silo whose text has an attribute that one unsteered vector does not tell, and what a root and a trunk that lie see.

Rows are random words of a few; a vector crosses for each row's last words alone, clipped and narrow.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.recovered import AttributeGuesses
from isthmus.attacks.view.view import Adversary
from isthmus.audit.scenario import AttackPlan, Scenario
from isthmus.audit.target import Target
from tests.conftest import make_recipe, write_rows
from tests.unit.attacks.attacked import say

NARROW: dict[str, Any] = {"tail": 1, "width": 4, "residual": True, "forward": {"clip": 1.0, "noise": 0.0}}


WORDS = range(4, 16)


def texts(count: int, seed: int, length: int = 8) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw.choices(WORDS, k=length) for _ in range(count)]


def scenario(
    model: Path,
    place: Path,
    attack: str,
    *,
    rows: int = 60,
    own: int = 800,
    silos: int = 1,
    boundary: Any = None,
    **sections: Any,
) -> Scenario:
    """The attack on one silo's rows, by an adversary with text of its own."""
    (place / "public.txt").write_text("\n".join(map(say, texts(own, 7, 9))))
    files = {
        name: write_rows(
            place / f"{name}.jsonl", [{"prompt": say(row[:-1]), "answer": say(row[-1:])} for row in texts(rows, seed)]
        )
        for seed, name in enumerate("ab"[:silos], 8)
    }
    recipe = make_recipe(
        model,
        silo=[{"name": name, "train": str(path)} for name, path in files.items()],
        boundary={**NARROW, **(boundary or {})},
        **{"model": {"bottom": 2}, **sections},
    )
    plan = AttackPlan(attacks=(attack,), rows=rows, own_rows=own, public=place / "public.txt")
    return Scenario(Target(recipe), plan, lambda _: None)


WIDE: dict[str, Any] = {"width": None, "residual": False, "forward": {"clip": 0.0, "noise": 0.0}}


def hijacked(model: Path, place: Path, **sections: Any) -> Scenario:
    """A silo that trains for long enough to be hijacked; its vectors are whole and clean."""
    train = {"learning_rate": 0.03, "rounds": 8, "steps": 10, "batch": 16}
    return scenario(
        model, place, "hijacking", rows=300, own=2000, silos=2, boundary=WIDE, **{"train": train, **sections}
    )


def knowledge_of(made: Scenario, adversary: Adversary) -> Knowledge:
    return Knowledge(made.view(adversary))


def accuracies(made: Scenario, found: AttributeGuesses) -> dict[str, float]:
    """The share of right guesses by method."""
    truth = [not found.tokens.isdisjoint(row[:-1]) for row in made.captured.truth]
    return {
        method: sum(one == two for one, two in zip(guesses, truth, strict=True)) / len(truth)
        for method, guesses in found.by.items()
    }
