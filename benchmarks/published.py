"""What the published systems send, measured on tensors of the same content: padded, fp16, with the full mask.

After the code of FedSEA-LLaMA (arXiv 2505.15683): hidden states and gradients cross with their padding in fp16, and
the first token of an inference brings an attention mask of every pair of positions.
"""

from __future__ import annotations

import torch


def training_step_bytes(lengths: list[int], padded: int, width: int) -> int:
    """All four directions of one step: hidden states up and down, gradients up and down."""
    h_BLD = torch.zeros(len(lengths), padded, width, dtype=torch.float16)
    return 4 * len(h_BLD.numpy().tobytes())


def mask_bytes(positions: int) -> int:
    """The mask that comes with an inference's first token."""
    return len(torch.zeros(1, 1, positions, positions, dtype=torch.float16).numpy().tobytes())


def token_bytes(width: int) -> int:
    """One decoded token, one direction."""
    return len(torch.zeros(1, 1, width, dtype=torch.float16).numpy().tobytes())
