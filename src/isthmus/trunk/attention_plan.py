"""What a packed pass must know of a part's attention: which positions each block may see, and the shape of its keys.

Families differ in this (full, sliding and chunked attention, in one model or another), so it is not listed for each:
one token is sent through the part, and the masks that the family's own code asks transformers for are recorded.

Shapes: T tokens, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from isthmus.errors import ModelError
from isthmus.model.cut import Part
from isthmus.model.device import CPU
from isthmus.model.rope import context_length, given_lengths

PROBE_ATTENTION = "isthmus_probe"
"""The name under which the probe is registered with transformers."""
LONGEST_PROBE = 1 << 17
"""Positions up to which a family's mask is compared with the known kinds."""

USUAL = {"dropout", "scaling", "sliding_window", "is_causal", "position_ids", "use_cache"}
"""Settings of an attention that masks and kernels here follow, or that change nothing."""

MaskFunction = Callable[..., Any]
"""Transformers' form of a mask: whether a query may see a key, from the indices of batch row, head, query and key."""


@dataclass(frozen=True)
class MaskRule:
    """The positions that the tokens of one block may see."""

    allowed: MaskFunction
    window: int | None = None
    """Number of positions that a token sees at most, its own included; None: all up to its own."""
    plain: bool = True
    """Whether ``window`` says all; otherwise only ``allowed`` does."""


@dataclass(frozen=True)
class AttentionPlan:
    """The attention of a part's blocks."""

    attention: str
    """Name of the part's own attention."""
    rules: tuple[MaskRule, ...]
    """The mask of each block."""
    heads: int
    """Number of heads of keys and values."""
    key_width: int
    """Width of a head's key."""
    value_width: int
    """Width of a head's value."""
    settings: frozenset[str] = frozenset()
    """Names of settings, beyond the usual ones, that a block gives its attention."""

    @property
    def uniform(self) -> bool:
        """Whether one kernel can compute all sequences of a pass: plain masks, keys as wide as values, and nothing else
        that changes attention."""
        plain = all(rule.plain for rule in self.rules) and not self.settings
        return plain and self.key_width == self.value_width


def plan_attention(part: Part) -> AttentionPlan:
    """The plan of a part, from one token sent through its blocks; of those that do not compute here rules are plain.

    Raises:
        ModelError: a block's attention is not transformers', sees later tokens, or has other shapes than the others'.
    """
    AttentionInterface.register(PROBE_ATTENTION, _record)
    AttentionMaskInterface.register(PROBE_ATTENTION, _rule)
    own = part.config._attn_implementation
    found = _Findings(context_length(part.config))
    like = next(part.parameters())
    part.config._attn_implementation = PROBE_ATTENTION
    try:
        with torch.no_grad(), given_lengths([1]):
            (part if part.here is None else part.stretch(part.here)).hidden(
                inputs_embeds=like.new_zeros(1, 1, part.config.hidden_size),
                attention_mask=torch.ones(1, 1, dtype=torch.bool, device=like.device),
                position_ids=torch.zeros(1, 1, dtype=torch.long, device=like.device),
                use_cache=False,
                sequences=found,
            )
    finally:
        part.config._attn_implementation = own
    return _plan(str(own), found, part)


@dataclass(frozen=True)
class _Findings:
    """What the probe has found so far."""

    context: int
    blocks: list[tuple[int, MaskRule, tuple[int, int, int]]] = field(default_factory=list)
    """Of each call of the attention: the block's index, its mask, and the heads and widths of its keys and values."""
    rules: dict[_Asked, MaskRule] = field(default_factory=dict)
    """The rule of each mask."""
    settings: set[str] = field(default_factory=set)
    """Names of settings that are not ``USUAL``."""


@dataclass(frozen=True)
class _Asked:
    """A mask as the family asked for it."""

    allowed: MaskFunction
    size: int | None
    """Size of the window or chunk, if the mask has one."""


def _rule(*, mask_function: MaskFunction, local_size: int | None = None, **_: Any) -> _Asked:
    """Registered in place of a function that computes a mask."""
    return _Asked(mask_function, local_size)


def _record(
    module: Any,
    query_1HTd: torch.Tensor,
    key_1HTd: torch.Tensor,
    value_1HTd: torch.Tensor,
    attention_mask: _Asked,
    *,
    sequences: _Findings,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Registered in place of an attention; its output is zero."""
    if attention_mask not in sequences.rules:
        sequences.rules[attention_mask] = _classify(attention_mask, sequences.context, query_1HTd.device)
    rule = sequences.rules[attention_mask]
    sequences.settings.update(name for name, value in settings.items() if value is not None and name not in USUAL)
    shape = key_1HTd.shape[1], key_1HTd.shape[-1], value_1HTd.shape[-1]
    sequences.blocks.append((module.layer_idx, rule, shape))
    heads, tokens = query_1HTd.shape[1:3]
    return query_1HTd.new_zeros(1, tokens, heads, value_1HTd.shape[-1]), None


def _plan(attention: str, found: _Findings, part: Part) -> AttentionPlan:
    blocks = found.blocks
    every = range(part.config.num_hidden_layers)
    expected = list(every if part.here is None else part.here)
    if [index for index, _, _ in blocks] != expected or len({shape for _, _, shape in blocks}) != 1:
        raise ModelError(
            f"the attention of {part.config.model_type} models is not the same call in every block",
            remedy="use a model whose blocks all have transformers' attention with equal heads",
        )
    rules = dict.fromkeys(every, MaskRule(causal_mask_function)) | {index: rule for index, rule, _ in blocks}
    return AttentionPlan(attention, tuple(rules.values()), *blocks[0][2], frozenset(found.settings))


def _classify(asked: _Asked, context: int, device: torch.device) -> MaskRule:
    """The rule of a mask: a plain one if it equals one around every boundary of its window, otherwise its own."""
    if not isinstance(asked, _Asked):
        raise ModelError("a block of this model attends without a mask", remedy="use a model of another type")
    span = min(context, LONGEST_PROBE)
    size = asked.size or 1
    edges = {edge + shift for edge in (0, size, 2 * size, 3 * size, span - 2) for shift in (-1, 0, 1)}
    queries = [query for query in sorted(edges) if 0 <= query < span]
    own = _seen(asked.allowed, queries, span, device)
    if any(row[query + 1 :].any() for query, row in zip(queries, own, strict=True)):
        raise ModelError(
            "a block of this model attends to later tokens, which are not known yet when a token is generated",
            remedy="use a causal language model",
        )
    for window in (None, asked.size):
        plain = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
        if torch.equal(own, _seen(plain, queries, span, device)):
            return MaskRule(asked.allowed, window)
    return MaskRule(asked.allowed, plain=False)


def _seen(allowed: MaskFunction, queries: list[int], span: int, device: torch.device) -> torch.Tensor:
    """The keys that these queries see, ``[queries, span]`` bool."""
    device = CPU if device.type == "meta" else device
    first = torch.zeros((), dtype=torch.long, device=device)
    query_Q1 = torch.tensor(queries, device=device).unsqueeze(1)
    key_1K = torch.arange(span, device=device).unsqueeze(0)
    seen: torch.Tensor = allowed(first, first, query_Q1, key_1K)
    return seen.expand(len(queries), span)
