"""Bytes that the published systems send, measured on tensors of the same content: padded, fp16, with the full mask.

After the code of FedSEA-LLaMA (arXiv 2505.15683): hidden states and gradients cross with their padding in fp16, and
the first token of an inference brings an attention mask of every pair of positions. Without caches every token is a
first one.

Shapes: B rows, L positions with padding, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from isthmus.model.cache import TrunkSession
from isthmus.model.crossing import Outbound, Reply
from isthmus.silo.remote import RemoteTrunk
from isthmus.wire import isthmus_pb2 as pb


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


class WholeSequences(nn.Module):
    """A trunk as the published no-cache mode asks it: the whole sequence and its mask, for every token again.

    Use it with ``generate(use_cache=False, logits_to_keep=0)``, since the published head too runs on all positions, and
    the codec fp16. Its mask covers the model's longest sequence each time, ours only what there is of this one.
    Implements ``model.split.TrunkModule``.

    Args:
        masked: send the mask's bytes too, on the same stream just before the hidden states.
    """

    def __init__(self, remote: RemoteTrunk, *, masked: bool) -> None:
        super().__init__()
        self._remote = remote
        self._masked = masked

    def forward(self, outbound: Outbound) -> Reply:
        if self._masked:
            self._remote.channel.submit(ballast(mask_bytes(max(outbound.lengths))))
        reply: Reply = self._remote(outbound)
        return reply

    def open_session(self) -> TrunkSession:
        raise NotImplementedError("there is no cache in this mode")


def ballast(size: int) -> pb.Ping:
    """A request that carries this many bytes, which its receiver skips: a field that ``Ping`` does not know."""
    return pb.Ping.FromString(pb.Tensor(data=bytes(size)).SerializeToString())
