"""The attacks by name: each turns what an adversary knows into what it finds."""

from __future__ import annotations

from collections.abc import Callable

from isthmus.attacks.found import Found, Tokens
from isthmus.attacks.gradients.readings import find_labels, read_returned, recover_responses
from isthmus.attacks.gradients.update_search import match_gradients, search_exactly
from isthmus.attacks.inversion.decoder import write
from isthmus.attacks.inversion.identification import identify
from isthmus.attacks.inversion.inverters import invert
from isthmus.attacks.inversion.matching import match
from isthmus.attacks.inversion.published import Schedule, decode_as_published
from isthmus.attacks.inversion.sampler import sample
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.membership.losses import infer_membership

Inversion = Callable[[Knowledge], list[list[int]]]
Attack = Callable[[Knowledge], Found]


def invert_linearly(knowledge: Knowledge) -> list[list[int]]:
    """The linear inverter's best token at every vector of every sequence."""
    crossings = knowledge.view.needs("crossings", "pairs").crossings
    return [knowledge.linear.best(crossing.hidden_LD.float(), 1)[:, 0].tolist() for crossing in crossings]


def _as_found(inversion: Inversion) -> Attack:
    return lambda knowledge: Tokens(inversion(knowledge))


INVERSIONS: dict[str, Inversion] = {
    "linear": invert_linearly,
    "matching": match,
    "transformer": invert,
    "decoder": write,
    "search": sample,
    "published": decode_as_published,
    "published-mended": lambda knowledge: decode_as_published(knowledge, Schedule(mended=True)),
}
"""By hidden states: they learn from the adversary's own rows."""
ATTACKS: dict[str, Attack] = {
    **{name: _as_found(inversion) for name, inversion in INVERSIONS.items()},
    "identify": identify,
    "labels": find_labels,
    "lens": read_returned,
    "responses": recover_responses,
    "dager": search_exactly,
    "gradient-matching": match_gradients,
    "membership": infer_membership,
}
USUAL = ("linear", "matching", "transformer")
"""Those made unless others are asked for: the others take long, or see something else, or are there for comparison."""
