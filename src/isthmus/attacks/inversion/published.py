"""The published decoder attack, for comparison.

After the code of FedSEA-LLaMA (arXiv 2505.15683): the last blocks of the public model, as many as bottom has, with norm
and head, trained on the colluding silo's hidden states. Its loss shifts the labels by one, as for a language model, so
it learns which token comes next at a vector, not which token stands there; it is then scored against the tokens
themselves. ``mended`` leaves the shift out and changes nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from isthmus.attacks.inversion.inverters import shuffled
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import Pair
from isthmus.errors import AttackError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part

IGNORED = -100


@dataclass(frozen=True)
class Schedule:
    """As published, but for the number of steps (8000 there)."""

    steps: int = 1000
    rows: int = 2
    learning_rate: float = 2e-5
    mended: bool = False
    seed: int = 0


def decode_as_published(knowledge: Knowledge, schedule: Schedule = Schedule()) -> list[list[int]]:
    """The likeliest token at each vector of every sequence in the view, in its order.

    Raises:
        AttackError: what crosses is narrower than the model, or only the ends of sequences cross.
    """
    view = knowledge.view.needs("crossings", "pairs")
    decoder = load_part(Checkpoint(str(view.folder)), Cut(1, knowledge.cut.bottom), "top")
    if view.pairs[0].crossing.hidden_LD.shape[1] != decoder.config.hidden_size or any(
        len(pair.tokens) != pair.crossing.length for pair in view.pairs
    ):
        raise AttackError("the published attack needs every token's whole vector", remedy="use --attack decoder")
    _train(decoder.requires_grad_(True), view.pairs, schedule)
    with torch.no_grad():
        return [_logits(decoder, [row.hidden_LD.float()])[0].argmax(dim=1).tolist() for row in view.crossings]


def _train(decoder: Part, pairs: Sequence[Pair], schedule: Schedule) -> None:
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=schedule.learning_rate, eps=1e-5, weight_decay=0.01)
    draw = random.Random(schedule.seed)
    batches = (batch for _ in cycle([None]) for batch in shuffled(list(pairs), schedule.rows, draw))
    decoder.train()
    for _, batch in zip(range(schedule.steps), batches, strict=False):
        labels = [torch.tensor(pair.tokens) for pair in batch]
        labels_BL = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        logits_BLV = _logits(decoder, [pair.crossing.hidden_LD.float() for pair in batch])
        if not schedule.mended:
            logits_BLV, labels_BL = logits_BLV[:, :-1], labels_BL[:, 1:]
        optimizer.zero_grad()
        cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    decoder.eval()


def _logits(decoder: Part, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[B, L, V]``; padded at the end, where a causal model never looks."""
    z_BLD = pad_sequence(list(rows), batch_first=True)
    logits_BLV: torch.Tensor = decoder.model(inputs_embeds=z_BLD, use_cache=False).logits
    return logits_BLV
