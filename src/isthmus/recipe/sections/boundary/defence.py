"""``[boundary.defence]``: what bottom learns against reconstruction."""

from __future__ import annotations

from isthmus.recipe.section import Amount, Section


class DefenceSection(Section):
    """Loss terms by which bottom and its bottleneck learn to send what the answer needs and little else of the text.

    Each key is the weight of one term, in nats, that is added to the task's loss at every training step. A term of
    weight 0 is measured and reported, and not trained. Left out: bottom learns the task alone.
    """

    answer: Amount = 0.0
    """Cross-entropy of the answer as a small head, which stays in the silo, predicts it from what crosses alone.
    Experimental: by itself it protected nothing in the run recorded."""
    inverter: Amount = 0.0
    """How well a simulated attacker, trained along, recovers the tokens from what crosses; bottom learns to
    lower it. Experimental: it hardly hindered an attack that knows bottom."""
    capacity: Amount = 0.0
    """The most that the noisy channel could carry with the power, before clipping, that bottom's output has. Needs clip
    and noise in boundary.forward."""
    correlation: Amount = 0.0
    """Distance correlation, 0 to 1, between the tokens' embeddings and what crosses (NoPeek). Experimental: for
    comparison, its measurement is not complete."""
