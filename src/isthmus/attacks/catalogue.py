"""The attacks by name. An attack is a function from an adversary's knowledge to what it recovers."""

from __future__ import annotations

from collections.abc import Callable

from isthmus.attacks.gradients.boundary_gradients import infer_labels, read_logit_lens, recover_responses
from isthmus.attacks.gradients.update_inversion import match_gradients, run_dager
from isthmus.attacks.hijacking import hijack
from isthmus.attacks.inversion.decoder import invert_by_decoder
from isthmus.attacks.inversion.identification import identify_rows
from isthmus.attacks.inversion.matching import match_vocabulary
from isthmus.attacks.inversion.published import PublishedSettings, run_published_decoder
from isthmus.attacks.inversion.sampler import invert_by_sampling
from isthmus.attacks.inversion.transformer import invert_by_transformer
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.membership.losses import infer_membership
from isthmus.attacks.recovered import Recovered, RecoveredTokens
from isthmus.attacks.steering import steer

Inversion = Callable[[Knowledge], list[list[int]]]
Attack = Callable[[Knowledge], Recovered]


def invert_linearly(knowledge: Knowledge) -> list[list[int]]:
    """The linear inverter's likeliest token at every vector of every sequence in the view, in the view's order."""
    crossings = knowledge.view.needs("crossings", "pairs").crossings
    return [knowledge.linear.best(crossing.hidden_LD.float(), 1)[:, 0].tolist() for crossing in crossings]


def _as_attack(inversion: Inversion) -> Attack:
    return lambda knowledge: RecoveredTokens(inversion(knowledge))


INVERSIONS: dict[str, Inversion] = {
    "linear": invert_linearly,
    "matching": match_vocabulary,
    "transformer": invert_by_transformer,
    "decoder": invert_by_decoder,
    "search": invert_by_sampling,
    "published": run_published_decoder,
    "published-mended": lambda knowledge: run_published_decoder(knowledge, PublishedSettings(mended=True)),
}
"""Embedding inversion: attacks on released hidden states that learn from the adversary's own rows."""
ATTACKS: dict[str, Attack] = {
    **{name: _as_attack(inversion) for name, inversion in INVERSIONS.items()},
    "identify": identify_rows,
    "labels": infer_labels,
    "lens": read_logit_lens,
    "responses": recover_responses,
    "dager": run_dager,
    "gradient-matching": match_gradients,
    "membership": infer_membership,
    "steering": steer,
    "hijacking": hijack,
}
ACTIVE = ("steering", "hijacking")
"""Attacks that change what the victim computes, and read one vector of each of its training rows."""
DEFAULT_ATTACKS = ("linear", "matching", "transformer")
"""The default of ``isthmus attack``. The other attacks take longer, need another view, or serve comparison."""
