"""Membership by the losses of the final model, and of reference models that the adversary trains as the silos do.

Who has this: an outsider with the final adapters and the public base model, who holds the rows to ask about. Reference
models need rows of the same kind, of which none is asked about: a silo that tells.

Shapes: N rows asked about, K reference models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from isthmus.attacks.found import Scores
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.membership.inference import by_difficulty, by_likelihood, by_loss
from isthmus.attacks.view.view import Row
from isthmus.attacks.whole import IGNORED, Whole, frozen, losses
from isthmus.model.optim import build_optimizer


def infer_membership(knowledge: Knowledge) -> Scores:
    """Scores of every row asked about: ``loss``, ``difficulty`` (against the references, or the public model where
    there are none) and, with two references or more, ``likelihood`` (offline LiRA).

    Raises:
        AttackError: the adversary holds no rows to ask about.
    """
    asked = knowledge.view.needs("asked").asked
    loss_N = list(losses(frozen(Whole(knowledge)), asked))
    wanted = knowledge.references if knowledge.view.own else 0
    reference_KN = [list(losses(_reference(knowledge, number), asked)) for number in range(wanted)]
    scores = {"loss": by_loss(loss_N).tolist()}
    scores["difficulty"] = by_difficulty(loss_N, reference_KN or [_public_losses(knowledge, asked)]).tolist()
    if len(reference_KN) > 1:
        scores["likelihood"] = by_likelihood(loss_N, reference_KN).tolist()
        return Scores(scores)
    missing = "no rows to train reference models on" if not knowledge.view.own else f"{wanted} reference models"
    return Scores(scores, (f"no likelihood ratio: {missing}",))


def _reference(knowledge: Knowledge, number: int) -> Whole:
    """A model like the final one, trained with the recipe's settings on a random half of the adversary's own rows."""
    view, train = knowledge.view, knowledge.view.recipe.train
    draw = random.Random(f"reference/{view.recipe.seed}/{number}")
    rows = draw.sample(view.own, max(1, len(view.own) // 2))
    untrained = Knowledge(replace(view, adapters={}, trunk_adapter={}))
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw.getrandbits(32))
        whole = Whole(untrained, noisy=True).eval()
        optimizer = build_optimizer(whole.adapter().values(), train)
        for _ in range(train.rounds * train.steps):
            optimizer.zero_grad()
            batch = draw.sample(rows, min(train.batch, len(rows)))
            weight = sum(len(row.answer) for row in batch)
            for row in batch:
                (whole.loss(row) * len(row.answer) / weight).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return frozen(whole)


@torch.no_grad()
def _public_losses(knowledge: Knowledge, rows: Sequence[Row]) -> list[float]:
    """By the public base model, uncut."""
    found = []
    for row in rows:
        ids_1L = torch.tensor([[*row.prompt, *row.answer]])
        labels_1L = ids_1L.clone()
        labels_1L[:, : len(row.prompt)] = IGNORED
        found.append(float(knowledge.language_model(input_ids=ids_1L, labels=labels_1L).loss))
    return found
