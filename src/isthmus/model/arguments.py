"""A caller's arguments, checked: either the split model computes with them what the uncut one does, or it refuses.

**The rule of positions.** At real tokens, positions count 0, 1, 2, … from the start of each sequence, and go on where a
cache ends. A row is one sequence, padded on its left, its right or both; or it is several, one after another without
padding, each of which starts at position 0. The trunk computes sequences, so all else has no meaning there.

Shapes: B rows, L new positions, P positions so far (the cache's and the new ones), K the last positions that logits are
computed of, D the model's width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation.configuration_utils import GenerationMode

from isthmus.errors import DataError, NotSupportedError
from isthmus.model.cache import SplitCache
from isthmus.model.crossing import IGNORED
from isthmus.model.cut import Part
from isthmus.model.packing import Packing
from isthmus.model.refusals import GENERATION_REFUSALS, HUB_MODE, refuse
from isthmus.model.rounded_linear import RoundedEmbedding

OUTPUTS = {
    "output_attentions": "attention weights",
    "output_hidden_states": "hidden states of single blocks",
    "output_router_logits": "router logits",
}
"""Arguments, and keys of a configuration, that ask for outputs of all blocks, the trunk's among them."""
LOSS = ("shift_labels", "num_items_in_batch")
"""Further arguments of the loss; top computes with them as the uncut model does."""
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Further descriptions of a packed row; they must agree with ``position_ids``."""
NO_MEANING = ("token_type_ids",)
"""Arguments that tokenizers make and no causal model reads, if they are all 0."""
OF_GENERATE = ("tokenizer", "assistant_tokenizer")
"""Arguments of ``generate`` that it hands on to the forward, where no model reads them."""
DECODING = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
"""The ways of decoding that transformers itself holds; the others it loads from the Hub."""


@dataclass(frozen=True)
class Places:
    """Where a batch's new tokens are."""

    real_BP: torch.Tensor
    """True for real tokens, false for padding; all positions so far."""
    starts_BL: torch.Tensor | None
    """True for the first token of each sequence; None if each row is one sequence."""
    attention_mask: torch.Tensor | None
    """``[B, P]``, as bottom and top take it."""
    position_ids: torch.Tensor | None
    """``[B, L]``, as bottom and top take them; None if they count from 0, or on from the cache, in every column."""

    def inputs(self) -> dict[str, torch.Tensor | None]:
        """The keyword arguments of bottom and top."""
        return {"attention_mask": self.attention_mask, "position_ids": self.position_ids}

    def real_of(self, length: int) -> torch.Tensor:
        """True for real tokens among the last ``length`` positions."""
        return self.real_BP[:, self.real_BP.shape[1] - length :]


def find_places(
    new: torch.Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    *,
    past_BP: torch.Tensor | None = None,
    cached: bool = False,
    keeps_apart: bool = True,
) -> Places:
    """Where the new tokens are, by the rule of positions.

    With padding on the left and no ``position_ids``, positions are those that ``generate`` computes from the mask. The
    uncut forward would count padding, too; attention depends on differences of positions alone.

    Args:
        new: token ids ``[B, L]`` or embeddings ``[B, L, D]``.
        attention_mask, position_ids: as a caller gave them.
        past_BP: true for real tokens in the cache; None: there are none.
        cached: whether the pass reads or fills a cache.
        keeps_apart: whether the uncut model of this family keeps sequences of one row apart.

    Raises:
        DataError: a shape or dtype does not fit.
        NotSupportedError: positions or mask break the rule.
    """
    batch, length = new.shape[:2]
    past_BP = new.new_zeros(batch, 0, dtype=torch.bool) if past_BP is None else past_BP
    if len(past_BP) != batch:
        raise DataError(
            f"the cache holds {len(past_BP)} rows, the batch has {batch}",
            remedy="continue with all rows of the cache, or select rows of it with batch_select_indices",
        )
    real_BP = _real(attention_mask, batch, length, past_BP)
    counted_BL = (real_BP.cumsum(dim=1) - 1)[:, past_BP.shape[1] :]
    if position_ids is None:
        padded_left = attention_mask is not None and not bool(real_BP[:, 0].all())
        return Places(real_BP, None, attention_mask, counted_BL.clamp_min(0) if padded_left else None)
    position_BL = _checked_positions(position_ids, batch, length).to(new.device)
    real_BL = real_BP[:, past_BP.shape[1] :]
    if bool((position_BL == counted_BL)[real_BL].all()):
        return Places(real_BP, None, attention_mask, position_BL)
    starts_BL = _starts(position_BL)
    _check_packed(starts_BL, attention_mask, cached=cached, keeps_apart=keeps_apart)
    return Places(real_BP, starts_BL, None, position_BL)


def _real(attention_mask: Any, batch: int, length: int, past_BP: torch.Tensor) -> torch.Tensor:
    """True for real tokens, ``[B, P]``, from a caller's mask."""
    shape = (batch, past_BP.shape[1] + length)
    if attention_mask is None:
        real_BP = torch.ones(shape, dtype=torch.bool, device=past_BP.device)
    else:
        real_BP = _checked_mask(attention_mask, shape, length).to(past_BP.device)
    if not torch.equal(real_BP[:, : past_BP.shape[1]], past_BP):
        raise NotSupportedError(
            "the attention mask contradicts the cache: it hides or shows other past tokens than before",
            remedy="pass the mask of all positions so far, with the cached ones as they were, or start a new cache",
        )
    begins = (real_BP[:, 1:] & ~real_BP[:, :-1]).sum(dim=1) + real_BP[:, :1].sum(dim=1)
    if bool((begins > 1).any()):
        raise NotSupportedError(
            "the attention mask has holes: 0 between tokens",
            remedy="pad rows on one side; with a cache on the left, since generated tokens follow on the right",
        )
    return real_BP


def _checked_mask(mask: Any, shape: tuple[int, int], length: int) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or mask.ndim in (3, 4):
        kind = f"{mask.ndim}-D" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise NotSupportedError(
            f"an attention mask of kind {kind} does not cross: the trunk receives whole sequences",
            remedy="pass a 2-D attention mask, 1 for real tokens and 0 for padding; for several sequences in one row "
            "pass position_ids that restart at 0 instead",
        )
    if tuple(mask.shape) != shape:
        raise DataError(
            f"the attention mask has shape {tuple(mask.shape)} for {shape[0]} rows of {length} new tokens"
            + (f" after {shape[1] - length}" if shape[1] > length else ""),
            remedy="pass a 2-D mask over all positions so far, 1 for real tokens and 0 for padding",
        )
    real_BP = mask.bool()
    if mask.dtype is not torch.bool and not bool((mask == real_BP.to(mask.dtype)).all()):
        raise NotSupportedError(
            "the attention mask has values other than 0 and 1",
            remedy="pass 1 for real tokens and 0 for padding; for several sequences in one row pass position_ids that "
            "restart at 0 instead",
        )
    return real_BP


def _checked_positions(position_ids: Any, batch: int, length: int) -> torch.Tensor:
    """``[B, L]`` from a caller's ``[B, L]`` or ``[1, L]``."""
    if not isinstance(position_ids, torch.Tensor) or position_ids.ndim != 2:
        raise DataError("position_ids are no 2-D tensor", remedy="pass one integer per new token, [rows, tokens]")
    if position_ids.dtype not in (torch.int64, torch.int32):
        raise DataError(f"position_ids have dtype {position_ids.dtype}", remedy="pass integers (torch.long)")
    if position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise DataError(
            f"position_ids have shape {tuple(position_ids.shape)} for {batch} rows of {length} new tokens",
            remedy="pass one position per new token",
        )
    return position_ids.expand(batch, -1)


def _starts(position_BL: torch.Tensor) -> torch.Tensor:
    """True where positions start at 0, more than once in some row. All others must be one more than the one before."""
    follows_BL = torch.cat([position_BL[:, :1] < 0, position_BL[:, 1:] == position_BL[:, :-1] + 1], dim=1)
    if bool(follows_BL[:, 1:].all()) or not bool((follows_BL | (position_BL == 0)).all()):
        raise NotSupportedError(
            "position_ids have gaps, an offset or another order",
            remedy="leave position_ids out, or let them count 0, 1, 2, … from each sequence's first token, and on from "
            "the cache",
        )
    return ~follows_BL


def _check_packed(
    starts_BL: torch.Tensor, attention_mask: torch.Tensor | None, *, cached: bool, keeps_apart: bool
) -> None:
    """Refuse several sequences in a row where the uncut model would attend across them.

    See ``_preprocess_mask_arguments`` in transformers' ``masking_utils``.
    """
    if cached:
        raise NotSupportedError(
            "position_ids restart within a row while a cache is in use: the uncut model attends across the sequences",
            remedy="pass use_cache=False, or set model.config.use_cache = False, as the Trainer does",
        )
    if attention_mask is not None:
        raise NotSupportedError(
            "position_ids restart within a row that has an attention mask: the uncut model attends across sequences",
            remedy="leave attention_mask out, or give each sequence a row of its own",
        )
    if not keeps_apart:
        raise NotSupportedError(
            "position_ids restart within a row: the uncut model of this family attends across the sequences",
            remedy="give each sequence a row of its own: no packing, no padding_free",
        )


def check_counted(places: Places, floor_scale: int) -> None:
    """Refuse what a family sees that scales attention by a place in the row (llama4), where a trunk knows sequences.

    Args:
        floor_scale: the number of places in a row from which on they have an effect.

    Raises:
        NotSupportedError: a row of that length begins with padding, or holds several sequences.
    """
    shifted = places.starts_BL is not None or not bool(places.real_BP[:, 0].all())
    if shifted and places.real_BP.shape[1] >= floor_scale:
        raise NotSupportedError(
            f"this family's attention counts the padding, or the other sequences, that come before a token in its row, "
            f"from {floor_scale} positions on",
            remedy="pass rows of equal length, rows padded on the right, or one row at a time",
        )


def check_packed_arguments(arguments: dict[str, Any], packing: Packing) -> None:
    """Compare the arguments of ``PACKED``, which collators add for flash attention, with the sequences.

    Raises:
        NotSupportedError: they describe other sequences than ``position_ids``.
    """
    lengths = torch.tensor(packing.lengths)
    ends = torch.nn.functional.pad(lengths.cumsum(dim=0), (1, 0)).tolist()
    expected = {"cu_seq_lens": ends, "max_length": max(packing.lengths)}
    for name, value in arguments.items():
        found = value.tolist() if isinstance(value, torch.Tensor) else value
        same = _same_sequences(value, packing) if name == "seq_idx" else found == expected[name[:-2]]
        if not same:
            raise NotSupportedError(
                f"{name} describes other sequences than position_ids",
                remedy="let the collator return position_ids that restart at 0 (return_position_ids=True), or leave "
                f"{name} out",
            )


def _same_sequences(seq_idx: Any, packing: Packing) -> bool:
    """Whether the sequences' numbers, ``[B, L]``, change exactly where sequences start."""
    if not isinstance(seq_idx, torch.Tensor) or seq_idx.shape != packing.real_BL.shape:
        return False
    changes_BL = torch.ones_like(packing.real_BL)
    changes_BL[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return torch.equal(changes_BL, packing.starts())


def take_arguments(arguments: dict[str, Any], config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """A caller's further keyword arguments of the forward.

    Returns:
        Those of the loss, and those that describe packed rows.

    Raises:
        NotSupportedError: an argument is unknown, or asks for what the split model does not compute.
    """
    for name, outputs in OUTPUTS.items():
        if arguments.get(name, getattr(config, name, None)):
            _refuse_outputs(name, outputs)
    skipped = {*OUTPUTS, *OF_GENERATE}
    given = {name: value for name, value in arguments.items() if value is not None and name not in skipped}
    if given.pop("is_causal", True) is not True:
        raise NotSupportedError(
            "attention in both directions (is_causal=False) does not cross: the trunk is causal",
            remedy="leave is_causal out",
        )
    if given.pop("ignore_index", IGNORED) != IGNORED:
        raise NotSupportedError(f"ignore_index is {IGNORED}", remedy=f"label positions without loss {IGNORED}")
    for name in NO_MEANING:
        if bool(torch.as_tensor(given.pop(name, 0)).any()):
            raise NotSupportedError(f"{name} have values other than 0", remedy=f"leave {name} out")
    for name in given:
        if name not in LOSS and name not in PACKED:
            raise NotSupportedError(
                f"the split model's forward has no argument {name!r}",
                remedy="check its spelling, or leave it out (with the Trainer: remove_unused_columns=True)",
            )
    loss = {name: given[name] for name in LOSS if name in given}
    return loss, {name: given[name] for name in PACKED if name in given}


def _refuse_outputs(name: str, outputs: str) -> NoReturn:
    elsewhere = (
        "TRL's trainers ask for them unless router_aux_loss_coef=0.0"
        if name == "output_router_logits"
        else "bottom's output is model.bottom.hidden(...), the last hidden states are those of model.base_model(...)"
    )
    raise NotSupportedError(
        f"{name}: {outputs} of the trunk's blocks are not in the silo",
        remedy=f"leave {name} out, in the model's configuration, too; {elsewhere}",
    )


def check_tokens(input_ids: Any, inputs_embeds: Any, embedding: nn.Module) -> torch.Tensor:
    """The new tokens ``[B, L]`` or embeddings ``[B, L, D]``, whichever a caller gave.

    Raises:
        DataError: none or both are given, shape or dtype does not fit, or an id is not in the vocabulary.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise DataError(
            "the model needs input_ids or inputs_embeds, and got " + ("neither" if input_ids is None else "both"),
            remedy="pass exactly one of them",
        )
    given, name, ndim = (input_ids, "input_ids", 2) if inputs_embeds is None else (inputs_embeds, "inputs_embeds", 3)
    if not isinstance(given, torch.Tensor) or given.ndim != ndim:
        shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        axes = "[rows, tokens]" if ndim == 2 else "[rows, tokens, width]"
        raise DataError(f"{name} have shape {shape}", remedy=f"pass a tensor {axes}")
    if 0 in given.shape:
        raise DataError(f"{name} have shape {tuple(given.shape)}: no token", remedy="remove empty batches and rows")
    assert isinstance(embedding, nn.Embedding | RoundedEmbedding)
    vocabulary, width = embedding.num_embeddings, embedding.embedding_dim
    if inputs_embeds is not None:
        if given.shape[2] != width or not given.is_floating_point():
            raise DataError(
                f"inputs_embeds have width {given.shape[2]} and dtype {given.dtype}",
                remedy=f"pass embeddings of width {width}, as model.get_input_embeddings() gives them",
            )
        return given
    if given.dtype not in (torch.int64, torch.int32):
        raise DataError(f"input_ids have dtype {given.dtype}", remedy="pass integers (torch.long)")
    _check_range(given, vocabulary, "input_ids")
    return given


def check_labels(labels: Any, shift_labels: Any, new: torch.Tensor, logits_to_keep: Any, vocabulary: int) -> None:
    """Check labels against the positions that logits are computed of.

    Raises:
        DataError: shape or dtype does not fit, or a label is not in the vocabulary.
    """
    batch, length = new.shape[:2]
    if isinstance(logits_to_keep, torch.Tensor):
        kept = len(logits_to_keep) if logits_to_keep.ndim == 1 else -1
    else:
        kept = len(range(length)[-logits_to_keep:])
    for name, value in (("labels", labels), ("shift_labels", shift_labels)):
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != (batch, kept) or value.is_floating_point():
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise DataError(
                f"{name} have shape {shape} for logits of {batch} rows of {kept} positions",
                remedy=f"pass one integer per position that logits are computed of, {IGNORED} for those without loss",
            )
        _check_range(value.masked_fill(value == IGNORED, 0), vocabulary, name)


def check_skipped(skip_logits: bool, labels: Any) -> None:
    """Refuse a forward that would compute nothing.

    Raises:
        DataError: it skips the logits, and there are no labels for a loss.
    """
    if skip_logits and labels is None:
        raise DataError("skip_logits leaves a loss alone, which needs labels", remedy="pass labels, or leave it out")


def _check_range(ids: torch.Tensor, vocabulary: int, name: str) -> None:
    low, high = ids.min(), ids.max()
    if bool(low < 0) or bool(high >= vocabulary):
        raise DataError(
            f"{name} hold {int(low if low < 0 else high)}, and the model's vocabulary is 0 to {vocabulary - 1}",
            remedy="use the tokenizer of this model's folder",
        )


def check_cache(cache: Any, bottom: Part) -> SplitCache | None:
    """A caller's ``past_key_values``.

    Raises:
        NotSupportedError: it is no cache of the split model with this bottom.
    """
    remedy = "pass model.new_cache(), or the past_key_values of this model's last output"
    if cache is not None and not isinstance(cache, SplitCache):
        raise NotSupportedError(f"past_key_values of type {type(cache).__name__} lack the trunk's part", remedy=remedy)
    if cache is not None and not cache.belongs_to(bottom):
        raise NotSupportedError("past_key_values are another split model's", remedy=remedy)
    return cache


def check_generation(config: GenerationConfig) -> None:
    """Refuse settings of a generation that reach into the blocks or into the cache.

    Raises:
        NotSupportedError: one of ``GENERATION_REFUSALS`` is set, or the way of decoding is code of the Hub.
    """
    for name, refusal in GENERATION_REFUSALS.items():
        if getattr(config, name, None) not in (None, False, "dynamic"):
            refuse(f"generate({name}=…)", refusal)
    mode = config.get_generation_mode()
    if mode not in DECODING:
        refuse(mode.value.replace("_", " "), HUB_MODE)
