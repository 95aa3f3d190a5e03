"""The bridge: a small stand-in for the trunk that lives in the silo and drafts what the trunk will answer.

It reads bottom's result at a position and the trunk's answer at the position before, which the silo has as soon as
the answer is there (as EAGLE does within one model; Li et al., ICML 2024, arXiv 2401.15077).

Shapes: B rows, L positions, T tokens, D width.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedConfig

from isthmus.errors import DataError
from isthmus.model.crossing import Outbound
from isthmus.model.cut import Cut, Part, empty_part, materialize_buffers
from isthmus.model.split import Reply

Tensors = dict[str, torch.Tensor]


class Bridge(nn.Module):
    """Implements ``model.split.TrunkModule`` within the silo, in fp32.

    Until it is trained it hands bottom's result on through copies of bottom's last blocks.

    Args:
        bottom: where the blocks' first weights come from.
        blocks: how many.
    """

    scale: torch.Tensor
    """Size of the trunk's answers: root mean square of a coordinate."""

    def __init__(self, bottom: Part, blocks: int = 1) -> None:
        super().__init__()
        width: int = bottom.config.hidden_size
        self.blocks = blocks
        self.part = _blocks_like(bottom, blocks)
        self.join = nn.Linear(2 * width, width, bias=False)
        self.register_buffer("scale", torch.ones(()))
        with torch.no_grad():
            self.join.weight.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1))

    def forward(self, outbound: Outbound) -> Reply:
        h_TD = outbound.h_TW
        assert h_TD is not None
        if outbound.cache is not None:
            session = outbound.cache.session
            assert isinstance(session, BridgeSession)
            return Reply(session.step(h_TD, outbound.lengths))
        pieces = torch.split(h_TD, outbound.lengths)
        return Reply(torch.cat([self.open_session().step(row_TD, [len(row_TD)]) for row_TD in pieces]))

    def open_session(self) -> BridgeSession:
        return BridgeSession(self)

    def guess(self, h_BLD: torch.Tensor, before_BLD: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        """The trunk's likely answers.

        Args:
            h_BLD: bottom's result at these positions; rows may be padded on the right.
            before_BLD: the trunk's answer at the position before each, zeros before the first.
            cache: the bridge's own, continued; without one the rows start at position 0.
        """
        joined = torch.cat([_even(h_BLD.float()), _even(before_BLD.float())], dim=-1)
        out_BLD = self.part.hidden(inputs_embeds=self.join(joined), past_key_values=cache, use_cache=cache is not None)
        return (out_BLD * self.scale).to(h_BLD.dtype)


class BridgeSession:
    """The bridge's KV cache for one row. Implements ``model.cache.TrunkSession``.

    What the trunk itself answered is told by ``hear`` and stands in place of the bridge's guesses.
    """

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._cache = DynamicCache(config=bridge.part.config)
        self._cache.activate_past_recording()
        self._answers_LD = bridge.join.weight.new_zeros(0, bridge.part.config.hidden_size)
        self._heard_LD = self._answers_LD

    def subjects(self, rows: list[list[int]] | None, lengths: list[int]) -> None:
        """None: nothing leaves the silo."""
        return

    def hear(self, g_LD: torch.Tensor) -> None:
        """The trunk's answers at the positions that the next step begins with."""
        self._heard_LD = g_LD.to(self._answers_LD)

    def step(self, h_TD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Append these tokens; returns the trunk's answers where they are known and guesses elsewhere, ``[T, D]``.

        Raises:
            DataError: more than one row.
        """
        if len(lengths) > 1:
            raise DataError(f"a draft of {len(lengths)} rows", remedy="draft for one row at a time")
        together = min(len(h_TD), len(self._heard_LD) + 1)  # each further one needs the guess before it
        answers = [self._step(h_TD[:together])]
        answers += [self._step(h_TD[place : place + 1]) for place in range(together, len(h_TD))]
        return torch.cat(answers).to(h_TD.dtype)

    def crop(self, positions: int) -> None:
        self._cache.crop(-positions)
        self._answers_LD = self._answers_LD[: len(self._answers_LD) - positions]

    def select(self, rows: list[int]) -> None:
        if rows != [0]:
            raise DataError(f"a draft of rows {rows[:8]}", remedy="draft for one row at a time")

    def close(self) -> None:
        self._cache = DynamicCache(config=self._bridge.part.config)

    def _step(self, h_LD: torch.Tensor) -> torch.Tensor:
        heard_LD, self._heard_LD = self._heard_LD[: len(h_LD)], self._heard_LD[len(h_LD) :]
        last_1D = self._answers_LD[-1:] if len(self._answers_LD) else torch.zeros_like(h_LD[:1], dtype=torch.float32)
        before_LD = torch.cat([last_1D, heard_LD])[: len(h_LD)]
        guess_LD = self._bridge.guess(h_LD.unsqueeze(0), before_LD.unsqueeze(0), self._cache)[0].float()
        answers_LD = torch.cat([heard_LD, guess_LD[len(heard_LD) :]])
        self._answers_LD = torch.cat([self._answers_LD, answers_LD])
        return answers_LD


def narrow(top: Part, words: torch.Tensor) -> Part:
    """Top with the same blocks and a head for these tokens only: to a draft, the head is as costly as eight blocks.

    Args:
        words: token ids; logit ``i`` is that of ``words[i]``.
    """
    model = copy.copy(top.model)
    model._modules = dict(model._modules)
    whole = model.get_submodule(top.family.head)
    head = nn.Linear(whole.weight.shape[1], len(words), bias=False, device="meta")
    head.weight = nn.Parameter(whole.weight[words].detach(), requires_grad=False)
    setattr(model, top.family.head, head)
    return Part("top", model, top.family, top.first_block)


def _even(h_BLD: torch.Tensor) -> torch.Tensor:
    """Each position at the same size: a residual stream's first position is a hundred times the rest."""
    return functional.rms_norm(h_BLD, h_BLD.shape[-1:], eps=1e-6)


def _blocks_like(bottom: Part, blocks: int) -> Part:
    """That many blocks of the family, each a copy of one of bottom's, the last of them its last."""
    config: PreTrainedConfig = copy.deepcopy(bottom.config)
    config.num_hidden_layers = blocks + 2
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[-1]] * config.num_hidden_layers
    part = empty_part(config, Cut(1, 1), "trunk")
    materialize_buffers(part.model)
    prefix, last = part.family.block_prefix(), bottom.config.num_hidden_layers - 1
    known = {name.replace(".base_layer", ""): tensor for name, tensor in bottom.model.named_parameters()}
    copies: Tensors = {}
    for name, _ in part.model.named_parameters():
        number, _, rest = name.removeprefix(prefix).partition(".")
        source = max(0, last - (blocks - 1 - int(number)))
        copies[name] = known[f"{prefix}{source}.{rest}"].detach().to(torch.float32, copy=True)
    part.model.load_state_dict(copies, strict=False, assign=True)
    return part.requires_grad_(True)
