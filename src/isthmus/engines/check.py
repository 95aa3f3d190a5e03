"""``isthmus check``: whether a model of one's own, split, computes what transformers computes with it uncut.

Both are computed in this process, one after the other, so that memory for one is enough.

Shapes: B rows, L positions, T positions that cross, D the model's width, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from isthmus.errors import ModelError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.crossing import IGNORED, Outbound, Reply
from isthmus.model.cut import Cut, Part, PartName, empty_part, load_part
from isthmus.model.families import family_of, uncut_class, uncut_shapes
from isthmus.model.packing import Packing
from isthmus.model.rope import by_length, context_length
from isthmus.model.split import SplitForCausalLM
from isthmus.recipe import LoraSection
from isthmus.trunk.adapter import full_adapter
from isthmus.trunk.packed_attention import SequenceCache
from isthmus.trunk.runner import Runner

LOGITS = 1e-4
"""Largest allowed difference of logits, relative to the largest: attention with and without padding round apart."""
GRADIENTS = 1e-3
"""Largest allowed difference of a tensor's gradient, relative to its norm."""
ANSWER = 16
"""Tokens generated for each prompt."""
SHORTEST = 2
"""Tokens of the shortest row: with one there is nothing to predict."""
PIECE = 16
"""Tokens of a prompt that the trunk computes in one pass."""
STRANGERS = (7, 19)
"""Lengths of another silo's sequences in a shared pass."""

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """One thing that both models computed."""

    what: str
    difference: float
    """Relative to the largest value, or for gradients to the tensor's norm."""
    allowed: float

    @property
    def equal(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        return f"{'ok ' if self.equal else 'NOT'} {self.what}: {self.difference:.1e} (allowed {self.allowed:.0e})"


@dataclass(frozen=True)
class Check:
    """The result of comparing a split model with the uncut one."""

    model: str
    cut: Cut
    length: int
    comparisons: tuple[Comparison, ...]
    window: int | None
    """The attention's window or chunk, if it is not shorter than the longest row."""

    @property
    def equal(self) -> bool:
        """Whether everything was equal up to rounding."""
        return all(one.equal for one in self.comparisons)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        place = f"{self.model} with {self.cut.bottom} blocks at the bottom and {self.cut.top} at the top"
        if not self.equal:
            wrong = ", ".join(one.what for one in self.comparisons if not one.equal)
            return f"not equal: {place} differs from the uncut model in {wrong}"
        return f"equal: {place} computes what the uncut model computes, on rows of up to {self.length} tokens"

    @property
    def note(self) -> str:
        """What the rows were too short for; empty: nothing."""
        if self.window is None:
            return ""
        return (
            f"note: its attention has a window of {self.window} tokens; --length {self.window + PIECE} checks beyond it"
        )


def check_model(path: str, cut: Cut | None = None, length: int = 64) -> Check:
    """Compare a split model with the uncut one: logits of padded rows, greedy tokens with a cache, gradients.

    Adapters have random values, the same in both. Everything is in fp32 on the CPU.

    Args:
        path: a model folder or id.
        cut: by default a third of the blocks at either end.
        length: number of tokens of the longest row; less where the model's context is too short for it.

    Raises:
        ModelError: the model is not supported, or its folder is incomplete.
        CutError: the cut does not fit the model.
    """
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    family_of(config)
    blocks: int = config.get_text_config().num_hidden_layers
    cut = cut or Cut(max(1, blocks // 3), max(1, blocks // 3))
    lora = LoraSection(rank=4, alpha=8.0, targets=tuple(_adapted_layers(config)))
    tensors = _adapter_values(config, cut, lora)
    length = _longest(config, length)
    rows = _rows(config, length)
    expected = _uncut_results(checkpoint, lora, tensors, rows)
    runner, ends = _parts(checkpoint, cut, lora, tensors)
    found: list[Comparison] = []
    for shared in (False, True):
        trunk = LocalTrunk(runner, shared=shared)
        split = SplitForCausalLM(config.get_text_config(), ends[0], trunk, ends[1]).eval()
        parts = [ends[0], runner.part, ends[1]]
        named = {name: one for part in parts for name, one in adapters.adapter_parameters(part).items()}
        found += _compared(
            _results(split, named, rows, alone=False), expected, ", in passes shared with a silo" * shared
        )
    return Check(path, cut, length, tuple(found), _window_beyond(config, runner, length))


class LocalTrunk(nn.Module):
    """Implements ``model.split.TrunkModule`` in this process: a runner without service and wire.

    Args:
        shared: add another silo's sequences, with an adapter of its own, to every pass.
    """

    def __init__(self, runner: Runner, *, shared: bool) -> None:
        super().__init__()
        self._runner = runner
        self._shared = shared

    def forward(self, outbound: Outbound) -> Reply:
        """The runner's results for a batch, differentiable if it has no cache."""
        h_TD, lengths = outbound.h_TW, outbound.lengths
        assert h_TD is not None
        if outbound.cache is None:
            return Reply(self._full(h_TD, lengths))
        session = outbound.cache.session
        assert isinstance(session, LocalSession)
        if not session.caches:
            session.caches = [self._runner.new_cache() for _ in lengths]
        results = [list(self._pieces(h_ND, cache)) for h_ND, cache in _by_row(h_TD, lengths, session.caches)]
        return Reply(torch.cat([piece for row in results for piece in row]))

    def open_session(self) -> LocalSession:
        """A session without rows."""
        return LocalSession()

    def _full(self, h_TD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        part = self._runner.part
        own = adapters.adapter_parameters(part)
        if not self._shared:
            return self._runner.full_pass(h_TD, lengths, [(len(h_TD), own)])
        other_TD = _noise(sum(STRANGERS), h_TD)
        other = full_adapter(part, {name: 2 * one.detach() for name, one in own.items()})
        first, last = torch.split(other_TD, list(STRANGERS))
        segments = [(len(first), other), (len(h_TD), own), (len(last), other)]
        packed_TD = torch.cat([first, h_TD, last])
        results_TD = self._runner.full_pass(packed_TD, [STRANGERS[0], *lengths, STRANGERS[1]], segments)
        return results_TD[len(first) : len(first) + len(h_TD)]

    def _pieces(self, h_ND: torch.Tensor, cache: SequenceCache) -> Iterator[torch.Tensor]:
        """A row's results, computed in pieces."""
        end = cache.length + len(h_ND)
        for piece in torch.split(h_ND, PIECE):
            if not self._shared:
                yield self._runner.cached_pass(piece, [len(piece)], [cache], [end])
                continue
            other = _noise(STRANGERS[0], h_ND)
            packed, lengths, caches = (
                torch.cat([other, piece]),
                [len(other), len(piece)],
                [self._runner.new_cache(), cache],
            )
            yield self._runner.cached_pass(packed, lengths, caches, [len(other), end])[len(other) :]


class LocalSession:
    """The KV caches of a generation's rows. Implements ``model.cache.TrunkSession``."""

    def __init__(self) -> None:
        self.caches: list[SequenceCache] = []

    def subjects(self, rows: list[list[int]] | None, lengths: list[int]) -> None:
        """None, since nothing leaves the process."""
        return

    def crop(self, positions: int) -> None:
        """Drop this many positions from the end of every row."""
        for cache in self.caches:
            cache.crop(cache.length - positions)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self.caches = [self.caches[row].copy() for row in rows]

    def close(self) -> None:
        """Free the caches."""
        self.caches = []


@dataclass(frozen=True)
class _Results:
    """What one of the models computed."""

    logits: dict[str, torch.Tensor]
    """Logits at real tokens, ``[T, V]``, by the side of the padding."""
    gradients: dict[str, torch.Tensor]
    tokens_BA: torch.Tensor
    """The greedy answers."""
    steps_ABV: torch.Tensor
    """Their logits."""


def _results(model: Any, named: Mapping[str, nn.Parameter], rows: dict[str, Inputs], *, alone: bool) -> _Results:
    """Logits, gradients and greedy tokens of a model whose adapter parameters are ``named``.

    Args:
        alone: compute each row in a batch of its own, without padding; the loss is that of all rows.
    """
    logits = {}
    for side, batch in rows.items():
        for parameter in named.values():
            parameter.grad = None
            parameter.requires_grad_()
        seen = []
        for piece in _single(batch) if alone else [batch]:
            output = model(**piece, use_cache=False)
            (output.loss * (_supervised(piece) / _supervised(batch))).backward()
            seen.append(output.logits.detach()[piece["attention_mask"].bool()])
        logits[side] = torch.cat(seen)
    gradients = {name: one.grad.clone() for name, one in named.items() if one.grad is not None}
    prompts = {key: rows["left"][key] for key in ("input_ids", "attention_mask")}
    model.generation_config = GenerationConfig(  # nothing of the folder's: no penalties, no end before the last token
        max_new_tokens=ANSWER, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        answers = [model.generate(**piece) for piece in (_single(prompts) if alone else [prompts])]
    tokens_BA = torch.cat([answer.sequences[:, -ANSWER:] for answer in answers])
    return _Results(logits, gradients, tokens_BA, torch.cat([torch.stack(one.logits) for one in answers], dim=1))


def _supervised(batch: Inputs) -> int:
    """Number of predictions that the loss is the mean of."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _single(batch: Inputs) -> list[Inputs]:
    """Each row of a batch as one without padding."""
    real_BL = batch["attention_mask"].bool()
    return [{key: one[row, real].unsqueeze(0) for key, one in batch.items()} for row, real in enumerate(real_BL)]


def _compared(found: _Results, expected: _Results, suffix: str) -> list[Comparison]:
    compared = [
        Comparison(f"logits of rows padded on the {side}{suffix}", _apart(found.logits[side], whole), LOGITS)
        for side, whole in expected.logits.items()
    ]
    names = expected.gradients.keys() | found.gradients.keys()
    worst = max(_gradients_apart(found.gradients.get(name), expected.gradients.get(name)) for name in names)
    compared.append(Comparison(f"gradients of all adapters{suffix}", worst, GRADIENTS))
    compared.append(Comparison(f"greedy tokens with a cache{suffix}", _answers_apart(found, expected), LOGITS))
    return compared


def _answers_apart(found: _Results, expected: _Results) -> float:
    """The difference of the logits that chose the tokens, up to each row's first token that differs: where two tokens
    are as likely as one another, rounding decides."""
    same_BA = (found.tokens_BA == expected.tokens_BA).cumprod(dim=1).bool()
    before_BA = torch.cat([torch.ones_like(same_BA[:, :1]), same_BA[:, :-1]], dim=1)
    chosen_AB = before_BA.T
    return _apart(found.steps_ABV[chosen_AB], expected.steps_ABV[chosen_AB])


def _apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return difference if difference == difference else float("inf")


def _gradients_apart(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    if actual is None or expected is None:
        return float("inf")
    difference = float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
    return difference if difference == difference else float("inf")


def _longest(config: PreTrainedConfig, length: int) -> int:
    """Number of tokens of the longest row: ``length``, or less if an answer to it would leave the model's context."""
    context = context_length(config)
    if context < SHORTEST + ANSWER:
        raise ModelError(
            f"the model's context of {context} tokens is too short to compare answers of {ANSWER} tokens",
            remedy=f"compare a model whose max_position_embeddings is at least {SHORTEST + ANSWER}",
        )
    return max(SHORTEST, min(length, context - ANSWER))


def _rows(config: PreTrainedConfig, length: int) -> dict[str, Inputs]:
    """Rows of random tokens, padded on the left and on the right, with labels; the longest has ``length``."""
    text = config.get_text_config()
    draw = torch.Generator().manual_seed(0)
    lengths = [max(SHORTEST, length // 9), length, max(SHORTEST, length // 3)]
    texts = [torch.randint(text.vocab_size, (one,), generator=draw) for one in lengths]
    return {side: _padded(texts, lengths, pad_left=side == "left") for side in ("left", "right")}


def _padded(texts: list[torch.Tensor], lengths: list[int], *, pad_left: bool) -> Inputs:
    real_BL = Packing.of_lengths(lengths, torch.device("cpu"), pad_left=pad_left).real_BL
    ids_BL = torch.zeros(real_BL.shape, dtype=torch.long)
    ids_BL[real_BL] = torch.cat(texts)
    return {
        "input_ids": ids_BL,
        "attention_mask": real_BL.long(),
        "position_ids": (real_BL.cumsum(dim=1) - 1).clamp_min(0),
        "labels": ids_BL.masked_fill(~real_BL, IGNORED),
    }


def _adapted_layers(config: PreTrainedConfig) -> list[str]:
    """Names of the linear layers that the attention of every block has."""
    family, found = family_of(config), None
    blocks = uncut_shapes(config).get_submodule(f"{family.uncut_prefix()}{family.blocks}")
    for block in blocks.children():
        named = {name.rpartition(".")[2] for name, one in block.named_modules() if isinstance(one, nn.Linear)}
        here = {name for name in named if any(f"attn.{name}" in path for path, _ in block.named_modules())}
        found = here if found is None else found & here
    if not found:
        raise ModelError(
            f"the blocks of {config.model_type} models have no linear layers of attention in common",
            remedy="name the layers to adapt in a recipe's lora.targets, and compare by hand",
        )
    return sorted(found)


def _adapter_values(config: PreTrainedConfig, cut: Cut, lora: LoraSection) -> dict[str, torch.Tensor]:
    """Random values of all adapter tensors, by uncut name."""
    values = {}
    parts: tuple[PartName, ...] = ("bottom", "trunk", "top")
    for name in parts:
        part = empty_part(config, cut, name)
        adapters.add_adapter(part, lora, 0, freeze_a=False)
        for tensor, parameter in adapters.adapter_parameters(part).items():
            seed = int.from_bytes(hashlib.sha256(tensor.encode()).digest()[:7])
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            values[tensor] = drawn / parameter.shape[1] ** 0.5 * (0.1 if "lora_B" in tensor else 1.0)
    return values


def _uncut_results(
    checkpoint: Checkpoint, lora: LoraSection, tensors: Mapping[str, torch.Tensor], rows: dict[str, Inputs]
) -> _Results:
    """What the uncut model with plain peft adapters computes.

    Where a token depends on the length of its row (``model.rope``), each row is alone: the uncut model would take the
    longest row's length for all of a batch.
    """
    whole = _uncut_model(checkpoint)
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=layers), whole)
    named = {name.replace(".default", ""): one for name, one in whole.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])
    whole.requires_grad_(False).eval()
    return _results(whole, named, rows, alone=by_length(checkpoint.config))


def _uncut_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The uncut model in fp32; quantized weights are dequantized, on a machine with an accelerator too."""
    config = copy.deepcopy(checkpoint.config)
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        config.quantization_config = {**dict(settings), "dequantize": True}
    try:
        model: PreTrainedModel = uncut_class(config).from_pretrained(
            checkpoint.folder, config=config, dtype=torch.float32
        )
    except ImportError as error:  # what transformers needs for this kind of quantization
        raise ModelError(
            f"transformers cannot load {checkpoint.folder} uncut: {error}", remedy="install the package that it names"
        ) from error
    return model


def _parts(
    checkpoint: Checkpoint, cut: Cut, lora: LoraSection, tensors: Mapping[str, torch.Tensor]
) -> tuple[Runner, tuple[Part, Part]]:
    """The runner of the trunk, and bottom and top, with these adapters."""
    bottom, trunk = load_part(checkpoint, cut, "bottom"), load_part(checkpoint, cut, "trunk")
    top = load_part(checkpoint, cut, "top", tied=bottom)
    for part in (bottom, trunk, top):
        adapters.add_adapter(part, lora, 0, freeze_a=False)
        adapters.load_adapter(part, tensors)
    return Runner(trunk), (bottom, top)


def _window_beyond(config: PreTrainedConfig, runner: Runner, length: int) -> int | None:
    """The attention's window or chunk if the longest row does not exceed it; None: there is none, or it does."""
    text = config.get_text_config()
    sizes = [rule.window for rule in runner.plan.rules if rule.window is not None]
    if not all(rule.plain for rule in runner.plan.rules):
        sizes.append(text.attention_chunk_size)
    beyond = [size for size in sizes if length <= size < text.max_position_embeddings]
    return min(beyond, default=None)


def _by_row(
    h_TD: torch.Tensor, lengths: list[int], caches: list[SequenceCache]
) -> Iterator[tuple[torch.Tensor, SequenceCache]]:
    yield from zip(torch.split(h_TD, lengths), caches, strict=True)


def _noise(tokens: int, like: torch.Tensor) -> torch.Tensor:
    """Another silo's hidden states, ``[tokens, D]``, about as large as these."""
    drawn = torch.randn(tokens, like.shape[1], generator=torch.Generator().manual_seed(1))
    return drawn * like.detach().std()
