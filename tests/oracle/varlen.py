"""What torch's ``varlen_attn`` promises, one sequence after another, in 64 bits; torch's own runs on CUDA only.

Shapes: T queries and S keys of all sequences, N and P of one, H heads, G heads of keys and values, d width of a head.
"""

from __future__ import annotations

import torch


def varlen(
    query_THd: torch.Tensor,
    key_SGd: torch.Tensor,
    value_SGd: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    most_q: int,
    most_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """A sequence's last query is aligned with its last key; a query sees ``window_size`` keys to each side and its own,
    where -1 is any number."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert (int(starts_q[-1]), int(starts_k[-1])) == (len(query_THd), len(key_SGd))
    assert (most_q, most_k) == (int(starts_q.diff().max()), int(starts_k.diff().max()))
    heads, groups = query_THd.shape[1], key_SGd.shape[1]
    assert heads == groups or enable_gqa
    scale = query_THd.shape[2] ** -0.5 if scale is None else scale
    key_SHd, value_SHd = (states.repeat_interleave(heads // groups, dim=1) for states in (key_SGd, value_SGd))
    outputs = []
    new, seen = starts_q.diff().tolist(), starts_k.diff().tolist()
    split = torch.split(query_THd, new), torch.split(key_SHd, seen), torch.split(value_SHd, seen)
    for query_NHd, key_PHd, value_PHd in zip(*split, strict=True):
        own_N1 = torch.arange(len(key_PHd) - len(query_NHd), len(key_PHd)).unsqueeze(1)
        away_NP = torch.arange(len(key_PHd)) - own_N1
        left, right = (size if size >= 0 else len(key_PHd) for size in window_size)
        hidden_NP = (away_NP < -left) | (away_NP > right)
        score_HNP = scale * torch.einsum("nhd,phd->hnp", query_NHd.double(), key_PHd.double())
        share_HNP = score_HNP.masked_fill(hidden_NP, -torch.inf).softmax(dim=2)
        outputs.append(torch.einsum("hnp,phd->nhd", share_HNP, value_PHd.double()).to(query_THd.dtype))
    return torch.cat(outputs)
