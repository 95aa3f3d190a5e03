"""Membership inference on the final model, with reference models that the adversary trains as the silos do.

Adversary: an outsider with the final adapters, the public base model and candidate rows. Training reference models also
takes rows of the same kind, none of them a candidate, from a colluding silo.

Shapes: N candidates, K reference models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.membership.inference import by_difficulty, by_likelihood, by_loss
from isthmus.attacks.recovered import MembershipScores
from isthmus.attacks.view.view import TokenRow
from isthmus.attacks.whole_model import WholeModel, frozen, losses
from isthmus.model.crossing import IGNORED
from isthmus.model.optim import build_optimizer, set_rate


def infer_membership(knowledge: Knowledge) -> MembershipScores:
    """Scores of every candidate by three methods: ``loss``; ``difficulty``, calibrated by the reference models, or by
    the public model if there are none; and, with at least two reference models, ``likelihood`` (offline LiRA).

    Raises:
        AttackError: the view has no candidates.
    """
    candidates = knowledge.view.needs("candidates").candidates
    loss_N = list(losses(frozen(WholeModel(knowledge)), candidates))
    count = knowledge.references if knowledge.view.reference_rows else 0
    reference_KN = [list(losses(_reference(knowledge, number), candidates)) for number in range(count)]
    scores = {"loss": by_loss(loss_N).tolist()}
    scores["difficulty"] = by_difficulty(loss_N, reference_KN or [_public_losses(knowledge, candidates)]).tolist()
    if len(reference_KN) > 1:
        scores["likelihood"] = by_likelihood(loss_N, reference_KN).tolist()
        return MembershipScores(scores)
    missing = f"{count} reference models" if knowledge.view.reference_rows else "no rows to train reference models on"
    return MembershipScores(scores, (f"no likelihood ratio: {missing}",))


def _reference(knowledge: Knowledge, number: int) -> WholeModel:
    """A reference model: trained with the recipe's settings on a random half of the reference rows."""
    view, train = knowledge.view, knowledge.view.recipe.train
    draw = random.Random(f"reference/{view.recipe.seed}/{number}")
    rows = draw.sample(view.reference_rows, max(1, len(view.reference_rows) // 2))
    untrained = Knowledge(replace(view, adapters={}, trunk_adapter={}), device=knowledge.device)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw.getrandbits(32))
        whole = WholeModel(untrained, noisy=True).eval()
        optimizer = build_optimizer(whole.adapter().values(), train)
        total = view.recipe.round_steps("", 1, len(rows)).total
        for number in range(1, total + 1):
            set_rate(optimizer, train.rate(number, total))
            optimizer.zero_grad()
            batch = draw.sample(rows, min(train.batch, len(rows)))
            weight = sum(len(row.answer) for row in batch)
            for row in batch:
                (whole.loss(row) * len(row.answer) / weight).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return frozen(whole)


@torch.no_grad()
def _public_losses(knowledge: Knowledge, rows: Sequence[TokenRow]) -> list[float]:
    """Each row's mean loss over its answer by the uncut public model."""
    public = []
    for row in rows:
        ids_1L = torch.tensor([[*row.prompt, *row.answer]])
        labels_1L = ids_1L.clone()
        labels_1L[:, : len(row.prompt)] = IGNORED
        public.append(float(knowledge.language_model(input_ids=ids_1L, labels=labels_1L).loss))
    return public
