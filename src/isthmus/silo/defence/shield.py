"""The shield: runs bottom with less attention to sensitive tokens, so that they affect other hidden states less.

Shapes: B rows, L new positions, P positions so far.
"""

from __future__ import annotations

from typing import Any

import torch

from isthmus.model.cut import Part
from isthmus.model.packing import Packing
from isthmus.privacy.averted_attention import averted_hidden
from isthmus.silo.records import Records


class Shield:
    """Implements ``model.split.BottomShield``.

    Args:
        records: classify the tokens.
        strength: factor of what is subtracted from the attention logits of a sensitive token's key; the class's
            aversion is the other factor.
    """

    def __init__(self, records: Records, strength: float) -> None:
        self._records = records
        self._strength = strength

    def hidden(self, bottom: Part, session: Any = None, **inputs: Any) -> torch.Tensor:
        """Bottom's hidden states, ``[B, L, D]``; arguments as for ``bottom.hidden``.

        Embeddings given in place of token ids cannot be classified: bottom then runs without change.

        Args:
            session: the ``silo.session.RemoteSession`` of the cache in ``inputs``, which has the earlier tokens'
                classes; None without a cache.
        """
        ids_BL = inputs.get("input_ids")
        if ids_BL is None or self._records.sensitivity is None:
            return bottom.hidden(**inputs)
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        real_BP = _real(inputs.get("attention_mask"), past, ids_BL)
        rows = Packing(real_BP[:, past:]).rows(ids_BL)
        classes = session.read_tokens(rows) if session is not None else self._records.classes(rows)
        if classes is None:
            return bottom.hidden(**inputs)
        aversions = self._strength * self._records.sensitivity.aversions
        return averted_hidden(bottom, _by_position(classes, aversions, real_BP), **inputs)


def _real(attention_mask: torch.Tensor | None, past: int, ids_BL: torch.Tensor) -> torch.Tensor:
    """Mask of the positions so far that hold tokens, ``[B, P]`` bool."""
    batch, length = ids_BL.shape
    if attention_mask is None:
        return torch.ones(batch, past + length, dtype=torch.bool, device=ids_BL.device)
    real_BP = attention_mask[:, -(past + length) :].bool()
    missing = past + length - real_BP.shape[1]
    return torch.nn.functional.pad(real_BP, (missing, 0), value=True)


def _by_position(classes: list[list[int]], values: torch.Tensor, real_BP: torch.Tensor) -> torch.Tensor:
    """The value of each token's class at the token's position, ``[B, P]``; 0 at padding."""
    values_BP = torch.zeros(real_BP.shape, device=real_BP.device)
    values = values.to(real_BP.device)
    for row, (numbers, real_P) in enumerate(zip(classes, real_BP, strict=True)):
        places = real_P.nonzero().flatten()[-len(numbers) :]
        values_BP[row, places] = values[torch.tensor(numbers[len(numbers) - len(places) :], device=real_BP.device)]
    return values_BP
