"""The decoder attack of FedSEA-LLaMA (arXiv 2505.15683) as published, for comparison.

The last blocks of the public model, as many as bottom has, with norm and head, are trained on the colluding silo's
hidden states. The published loss shifts the labels by one, as for a language model, so the decoder learns the next
token of a vector, not its own token, but is scored on the latter. ``mended`` removes the shift and changes nothing
else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from isthmus.attacks.inversion.transformer import shuffled_batches
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import KnownPair
from isthmus.errors import AttackError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.crossing import IGNORED
from isthmus.model.cut import Cut, Part, load_part


@dataclass(frozen=True)
class PublishedSettings:
    """The published settings, except for the number of steps (published: 8000)."""

    steps: int = 1000
    rows: int = 2
    """Rows per step."""
    learning_rate: float = 2e-5
    mended: bool = False
    """Train without the shift of the labels."""
    seed: int = 0


def run_published_decoder(knowledge: Knowledge, settings: PublishedSettings = PublishedSettings()) -> list[list[int]]:
    """The likeliest token at every vector of every sequence in the view, in the view's order.

    Raises:
        AttackError: the view has no crossings or no own rows, or the recipe has ``boundary.width`` or
            ``boundary.tail``.
    """
    view = knowledge.view.needs("crossings", "pairs")
    decoder = load_part(Checkpoint(str(view.folder)), Cut(1, knowledge.cut.bottom), "top", device=knowledge.device)
    if view.pairs[0].crossing.hidden_LD.shape[1] != decoder.config.hidden_size or any(
        len(pair.tokens) != pair.crossing.length for pair in view.pairs
    ):
        raise AttackError("the published attack needs all tokens at the model's width", remedy="use --attack decoder")
    _train(decoder.requires_grad_(True), view.pairs, settings)
    with torch.no_grad():
        return [_logits(decoder, [row.hidden_LD.float()])[0].argmax(dim=1).tolist() for row in view.crossings]


def _train(decoder: Part, pairs: Sequence[KnownPair], settings: PublishedSettings) -> None:
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=settings.learning_rate, eps=1e-5, weight_decay=0.01)
    draw = random.Random(settings.seed)
    batches = (batch for _ in cycle([None]) for batch in shuffled_batches(list(pairs), settings.rows, draw))
    decoder.train()
    for _, batch in zip(range(settings.steps), batches, strict=False):
        labels = [torch.tensor(pair.tokens) for pair in batch]
        labels_BL = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        logits_BLV = _logits(decoder, [pair.crossing.hidden_LD.float() for pair in batch])
        if not settings.mended:
            logits_BLV, labels_BL = logits_BLV[:, :-1], labels_BL[:, 1:]
        optimizer.zero_grad()
        cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    decoder.eval()


def _logits(decoder: Part, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits of rows padded at the end, ``[B, L, V]``."""
    z_BLD = pad_sequence(list(rows), batch_first=True)
    logits_BLV: torch.Tensor = decoder.model(inputs_embeds=z_BLD, use_cache=False).logits
    return logits_BLV
