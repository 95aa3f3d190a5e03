"""Rotary embeddings by sequence: what a sequence gets depends on its own length and on nothing else.

transformers chooses the frequencies of the rope types ``dynamic`` and ``longrope`` by the largest position of the whole
pass and keeps them in the module until the next pass. Passes here mix sequences of many silos, chunks of prompts and
tokens of generations. So the family's own module is asked once for each length that occurs, always in its first state.

Shapes: B rows, L positions, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens of a pass stand in their sequences."""

    positions_BL: torch.Tensor
    """Position of each token within its sequence, below its length."""
    lengths_BL: torch.Tensor
    """The length that decides a token's frequencies."""


_places: ContextVar[TokenPlaces | None] = ContextVar("_places", default=None)
_given: ContextVar[tuple[torch.Tensor, torch.Tensor | None] | None] = ContextVar("_given", default=None)


class SequenceRope(nn.Module):
    """In place of a family's rotary embedding whose frequencies depend on the length of the pass.

    Args:
        rope: the family's module; it stays in its first state.
    """

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        """What the family's module gives each sequence by itself.

        Args:
            x: a tensor with the device and dtype of the result.
            position_ids: ``[B, L]``; read only outside of the backbone's forward.
        """
        places = _places.get() or token_places(position_ids, torch.ones_like(position_ids, dtype=torch.bool))
        keys_BL = self._keys(places.lengths_BL, layer_type)
        found = sorted(set(keys_BL.flatten().tolist()))
        if len(found) == 1:
            return self._ask(x, places.positions_BL, found[0], layer_type)
        chosen = [(keys_BL.flatten() == key).nonzero().flatten() for key in found]
        positions_T = places.positions_BL.flatten()
        answers = [
            self._ask(x, positions_T[own].unsqueeze(0), key, layer_type) for own, key in zip(chosen, found, strict=True)
        ]
        order_T = torch.cat(chosen).argsort().to(x.device)
        return _joined(answers, lambda pieces: torch.cat(pieces, dim=1)[0, order_T].view(*keys_BL.shape, -1))

    def switch(self) -> int | None:
        """The length above which longrope takes its long factors; None: the module has another type."""
        names = self.rope.rope_type if isinstance(self.rope.rope_type, dict) else {None: self.rope.rope_type}
        return next((self._switch(layer_type) for layer_type, name in names.items() if name == "longrope"), None)

    def _switch(self, layer_type: str | None) -> int:
        parameters: Any = self.rope.config.rope_parameters  # type: ignore[union-attr]
        own = parameters if layer_type is None else parameters[layer_type]
        return int(own["original_max_position_embeddings"])

    def _keys(self, lengths_BL: torch.Tensor, layer_type: str | None) -> torch.Tensor:
        """A length for each token that gives the same frequencies as its own; few tokens have different ones."""
        names: Any = self.rope.rope_type
        name = names if layer_type is None else names[layer_type]
        if "dynamic" in name:
            return lengths_BL.clamp_min(self.rope.original_max_seq_len)  # type: ignore[arg-type]
        if name == "longrope":
            switch = self._switch(layer_type)
            return torch.where(lengths_BL > switch, switch + 1, switch)
        return torch.ones_like(lengths_BL)

    def _ask(self, x: torch.Tensor, positions_BL: torch.Tensor, length: int, layer_type: str | None) -> Any:
        """The family's answer at these positions of a sequence of this length, whose last position is asked too."""
        last_B1 = positions_BL.new_full((len(positions_BL), 1), length - 1)
        fresh = copy.copy(self.rope)  # the module changes its state when it is called
        fresh._buffers = {name: None if one is None else one.clone() for name, one in self.rope._buffers.items()}
        layer = {} if layer_type is None else {"layer_type": layer_type}
        answer = fresh(x, torch.cat([positions_BL, last_B1], dim=1).to(x.device), **layer)
        return _joined([answer], lambda pieces: pieces[0][:, :-1])


def install(model: nn.Module, backbone: nn.Module) -> None:
    """Put a ``SequenceRope`` in the place of each rotary embedding whose frequencies depend on the pass, if any does.

    Args:
        model: the whole module.
        backbone: the module of it whose forward has masks, positions and cache.
    """
    found = {name: one for name, one in model.named_modules() if _depends_on_length(one)}
    for name, rope in found.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, SequenceRope(rope))
    if found:
        backbone.register_forward_pre_hook(_note_places, with_kwargs=True)
        backbone.register_forward_hook(_forget_places, always_call=True)


def by_length(config: PreTrainedConfig) -> bool:
    """Whether what a model computes for a token depends on the length of its sequence."""
    return any(_of_length(one.get("rope_type")) for one in _parameters(config))


@contextmanager
def given_lengths(
    lengths: Sequence[int] | torch.Tensor | None, positions_BL: torch.Tensor | None = None
) -> Iterator[None]:
    """Context in which these lengths decide, in place of what masks, positions and cache of a pass say.

    Args:
        lengths: one for each row, or a tensor that expands to ``[B, L]``; None: masks, positions and cache decide.
        positions_BL: the pass's positions, known on the processor, so that nobody waits for a device.
    """
    known = lengths if lengths is None or isinstance(lengths, torch.Tensor) else torch.tensor(lengths).unsqueeze(1)
    token = _given.set(None if known is None else (known, positions_BL))
    try:
        yield
    finally:
        _given.reset(token)


def token_places(positions_BL: torch.Tensor, real_BL: torch.Tensor, *, alone: bool = False) -> TokenPlaces:
    """The places of a pass's tokens, on the processor.

    Args:
        positions_BL: position of each token; where they do not rise, another sequence begins in the row.
        real_BL: false at padding.
        alone: each token's own position decides, as if none followed; otherwise the last of its sequence's.
    """
    positions_BL, real_BL = positions_BL.cpu(), real_BL.cpu()
    if alone:
        return TokenPlaces(positions_BL, positions_BL + 1)
    before_BL = torch.nn.functional.pad(positions_BL[:, :-1], (1, 0), value=-1)
    sequence_BL = (positions_BL <= before_BL).long().cumsum(dim=1)
    last_BL = torch.zeros(len(positions_BL), positions_BL.shape[1] + 1, dtype=torch.long)
    last_BL = last_BL.scatter_reduce(1, sequence_BL, positions_BL * real_BL, "amax")
    return _within(positions_BL, last_BL.gather(1, sequence_BL) + 1)


def _within(positions_BL: torch.Tensor, lengths_BL: torch.Tensor) -> TokenPlaces:
    """The places with positions below the lengths: padding may lie beyond."""
    return TokenPlaces(torch.minimum(positions_BL, lengths_BL - 1), lengths_BL)


def context_length(config: PreTrainedConfig) -> int:
    """Largest number of tokens of a sequence. Dynamic frequencies go beyond the length the model was trained for."""
    factors = [one["factor"] for one in _parameters(config) if "dynamic" in one.get("rope_type", "")]
    return int(config.get_text_config(decoder=True).max_position_embeddings * max([1.0, *factors]))


def recomputed_after(model: nn.Module) -> int | None:
    """The length after which the family's ``generate`` drops its KV cache and computes the whole sequence again.

    Families differ: phi3 does so where longrope switches, others keep what they have. The family's code is asked.

    Returns:
        The length; None: the family keeps its cache.
    """
    switches = [one.switch() for one in model.modules() if isinstance(one, SequenceRope)]
    switch = next((one for one in switches if one is not None), None)
    prepare: Any = getattr(type(model), "prepare_inputs_for_generation", None)
    if switch is None or prepare in (None, GenerationMixin.prepare_inputs_for_generation):
        return None
    ids_1L = torch.zeros(1, switch + 1, dtype=torch.long)
    settings = {"attention_mask": torch.ones_like(ids_1L), "use_cache": True, "next_sequence_length": 1}
    inputs = prepare(model, ids_1L, past_key_values=_FullCache(switch), **settings)
    return switch if inputs.get("past_key_values") is None else None


class _FullCache(Cache):
    """A cache that says it holds this many positions."""

    def __init__(self, length: int) -> None:
        super().__init__(layers=[DynamicLayer()])
        self._length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length


def _depends_on_length(module: nn.Module) -> bool:
    names: Any = getattr(module, "rope_type", None)
    return any(map(_of_length, names.values() if isinstance(names, dict) else [names]))


def _of_length(rope_type: Any) -> bool:
    return isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope")


def _parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rope parameters of each layer type, or the only ones."""
    parameters: dict[str, Any] = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    nested = [one for one in parameters.values() if isinstance(one, dict)]
    return nested or [parameters]


def _note_places(backbone: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    """Before a backbone's forward: work out the places of its tokens from its arguments."""
    new = args[0] if args else inputs.get("input_ids")
    new = inputs["inputs_embeds"] if new is None else new
    given = _given.get()
    if given is None:
        _places.set(_read_places(new, inputs))
    else:
        lengths, positions_BL = given
        positions_BL = torch.arange(new.shape[1]) if positions_BL is None else positions_BL
        shape = new.shape[:2]
        _places.set(_within(positions_BL.expand(shape), lengths.expand(shape)))


def _read_places(new: torch.Tensor, inputs: dict[str, Any]) -> TokenPlaces:
    """The places of new tokens from a backbone's mask, positions and cache."""
    cache, mask, positions = (inputs.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
    batch, length = new.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    real_BL = torch.ones(batch, length, dtype=torch.bool)
    positions_BL = torch.arange(past, past + length).expand(batch, length)
    if isinstance(mask, torch.Tensor) and mask.shape == (batch, past + length):
        real_BL = mask[:, past:].bool()
        positions_BL = (mask.long().cumsum(dim=1) - 1)[:, past:].clamp_min(0)
    if positions is not None:
        positions_BL = positions.expand(batch, length)
    return token_places(positions_BL, real_BL, alone=past > 0 and getattr(cache, "drafted", False))


def _forget_places(backbone: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _places.set(None)


def _joined(answers: list[Any], join: Any) -> Any:
    """Answers of one module, each a tensor or a tuple of tensors, joined tensor by tensor."""
    if isinstance(answers[0], torch.Tensor):
        return join(answers)
    return tuple(join(list(pieces)) for pieces in zip(*answers, strict=True))
