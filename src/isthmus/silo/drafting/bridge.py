"""The bridge: a small model in the silo that predicts the trunk's answers, to draft tokens.

Its input at a position is bottom's output there and the trunk's answer at the position before, as in EAGLE within one
model (Li et al., ICML 2024, arXiv 2401.15077).

Shapes: B rows, L positions, T tokens, D width.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache

from isthmus.errors import DataError
from isthmus.model.crossing import Outbound, Reply
from isthmus.model.cut import Part, materialize_buffers, part_of_blocks
from isthmus.model.rounded_linear import RoundedLinear


class Bridge(nn.Module):
    """Implements ``model.split.TrunkModule`` within the silo, in fp32.

    Before training it applies copies of bottom's last blocks to bottom's output.

    Args:
        bottom: the part whose last blocks are copied.
        blocks: number of blocks.
    """

    scale: torch.Tensor
    """Root mean square of the coordinates of the trunk's answers."""

    def __init__(self, bottom: Part, blocks: int = 1) -> None:
        super().__init__()
        width: int = bottom.config.hidden_size
        self.blocks = blocks
        self.part = _copied_blocks(bottom, blocks)
        self.join = nn.Linear(2 * width, width, bias=False)
        self.register_buffer("scale", torch.ones(()))
        with torch.no_grad():
            self.join.weight.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1))

    def forward(self, outbound: Outbound) -> Reply:
        """Predicted answers to a batch, with its session's known answers if it has a cache."""
        h_TD = outbound.h_TW
        assert h_TD is not None
        if outbound.cache is not None:
            session = outbound.cache.session
            assert isinstance(session, BridgeSession)
            return Reply(session.step(h_TD, outbound.lengths))
        pieces = torch.split(h_TD, outbound.lengths)
        return Reply(torch.cat([self.open_session().step(row_TD, [len(row_TD)]) for row_TD in pieces]))

    def open_session(self) -> BridgeSession:
        """A session with an empty KV cache."""
        return BridgeSession(self)

    def predict(self, h_BLD: torch.Tensor, before_BLD: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        """Predictions of the trunk's answers, ``[B, L, D]``, in the dtype of ``h_BLD``.

        Args:
            h_BLD: bottom's output at these positions; rows may be padded on the right.
            before_BLD: the trunk's answer at the position before each; zeros before the first.
            cache: the bridge's KV cache, which is extended; None: rows start at position 0.
        """
        joined = torch.cat([_normalized(h_BLD.float()), _normalized(before_BLD.float())], dim=-1)
        out_BLD = self.part.hidden(inputs_embeds=self.join(joined), past_key_values=cache, use_cache=cache is not None)
        return (out_BLD * self.scale).to(h_BLD.dtype)


class BridgeSession:
    """The bridge's KV cache for one row. Implements ``model.cache.TrunkSession``.

    Answers of the trunk, given to ``set_answers``, take the place of the bridge's predictions.
    """

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._cache = DynamicCache(config=bridge.part.config)
        self._cache.activate_past_recording()
        self._answers_LD = bridge.join.weight.new_zeros(0, bridge.part.config.hidden_size)
        self._known_LD = self._answers_LD

    def subjects(self, rows: list[list[int]] | None, lengths: list[int]) -> None:
        """None, since nothing leaves the silo."""
        return

    def set_answers(self, g_LD: torch.Tensor) -> None:
        """Set the trunk's answers at the first positions of the next step."""
        self._known_LD = g_LD.to(self._answers_LD)

    def step(self, h_TD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Append positions to the cache. Returns the trunk's answers where known and predictions elsewhere, ``[T, D]``.

        Raises:
            DataError: there is more than one row.
        """
        if len(lengths) > 1:
            raise DataError(f"a draft has {len(lengths)} rows", remedy="draft for one row at a time")
        together = min(len(h_TD), len(self._known_LD) + 1)  # each further one needs the prediction before it
        answers = [self._step(h_TD[:together])]
        answers += [self._step(h_TD[position : position + 1]) for position in range(together, len(h_TD))]
        return torch.cat(answers).to(h_TD.dtype)

    def crop(self, positions: int) -> None:
        """Drop this many positions from the end."""
        self._cache.crop(-positions)
        self._answers_LD = self._answers_LD[: len(self._answers_LD) - positions]

    def select(self, rows: list[int]) -> None:
        """Accept the only row.

        Raises:
            DataError: ``rows`` is not ``[0]``.
        """
        if rows != [0]:
            raise DataError(f"a draft cannot select rows {rows[:8]}", remedy="draft for one row at a time")

    def close(self) -> None:
        """Free the KV cache."""
        self._cache = DynamicCache(config=self._bridge.part.config)

    def _step(self, h_LD: torch.Tensor) -> torch.Tensor:
        known_LD, self._known_LD = self._known_LD[: len(h_LD)], self._known_LD[len(h_LD) :]
        last_1D = self._answers_LD[-1:] if len(self._answers_LD) else torch.zeros_like(h_LD[:1], dtype=torch.float32)
        before_LD = torch.cat([last_1D, known_LD])[: len(h_LD)]
        predicted_LD = self._bridge.predict(h_LD.unsqueeze(0), before_LD.unsqueeze(0), self._cache)[0].float()
        answers_LD = torch.cat([known_LD, predicted_LD[len(known_LD) :]])
        self._answers_LD = torch.cat([self._answers_LD, answers_LD])
        return answers_LD


def restrict_head(top: Part, vocabulary: torch.Tensor) -> Part:
    """Top with a head for these tokens only. In a draft the full head costs as much as eight blocks.

    Args:
        vocabulary: token ids; logit ``i`` is that of ``vocabulary[i]``.
    """
    model = copy.copy(top.model)
    model._modules = dict(model._modules)
    whole = model.get_submodule(top.family.head)
    head = nn.Linear(whole.in_features, len(vocabulary), bias=whole.bias is not None, device="meta")
    for name in ("weight", "bias"):
        if (values := getattr(whole, name)) is not None:
            setattr(head, name, nn.Parameter(values[vocabulary].detach(), requires_grad=False))
    setattr(model, top.family.head, head)
    return Part("top", model, top.family, top.first_block, top.whole)


def _normalized(h_BLD: torch.Tensor) -> torch.Tensor:
    """Each position scaled to root mean square 1: a residual stream's first position is a hundred times the others."""
    return functional.rms_norm(h_BLD, h_BLD.shape[-1:], eps=1e-6)


def _copied_blocks(bottom: Part, blocks: int) -> Part:
    """A part with copies of bottom's last blocks, in fp32 and trainable. If bottom has fewer, its first is repeated."""
    last = bottom.config.num_hidden_layers - 1
    sources = [max(0, last - (blocks - 1 - number)) for number in range(blocks)]
    part = part_of_blocks(bottom.whole, "trunk", sources)
    materialize_buffers(part.model)
    prefix = part.family.block_prefix()
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in bottom.model.state_dict().items()}
    rounded = (pair for pair in bottom.model.named_modules() if isinstance(pair[1], RoundedLinear))
    weights |= {f"{name.replace('.base_layer', '')}.weight": layer.weight for name, layer in rounded}
    copies: dict[str, torch.Tensor] = {}
    for name in part.model.state_dict():
        number, _, rest = name.removeprefix(prefix).partition(".")
        copies[name] = weights[f"{prefix}{sources[int(number)]}.{rest}"].detach().to(torch.float32, copy=True)
    part.model.load_state_dict(copies, strict=False, assign=True)
    return part.requires_grad_(True)
