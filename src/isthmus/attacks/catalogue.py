"""The inversion attacks by name: each turns a view into the tokens of its sequences."""

from __future__ import annotations

from collections.abc import Callable

from isthmus.attacks.decoder import write
from isthmus.attacks.inverters import invert
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.matching import match
from isthmus.attacks.published import Schedule, decode_as_published

Inversion = Callable[[Knowledge], list[list[int]]]


def invert_linearly(knowledge: Knowledge) -> list[list[int]]:
    """The linear inverter's best token at every vector of every sequence."""
    crossings = knowledge.view.needs("crossings", "pairs").crossings
    return [knowledge.linear.best(crossing.hidden_LD.float(), 1)[:, 0].tolist() for crossing in crossings]


INVERSIONS: dict[str, Inversion] = {
    "linear": invert_linearly,
    "matching": match,
    "transformer": invert,
    "decoder": write,
    "published": decode_as_published,
    "published-mended": lambda knowledge: decode_as_published(knowledge, Schedule(mended=True)),
}
USUAL = ("linear", "matching", "transformer")
"""Those made unless others are asked for: the others take long, or are there for comparison."""
