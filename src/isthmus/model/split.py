"""The split model: bottom and top here, the trunk wherever its module says; to transformers an ordinary causal LM.

Shapes: B rows, L new positions, T real tokens among them, D width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from isthmus.errors import DataError
from isthmus.model import adapters
from isthmus.model.cache import SplitCache, TrunkSession
from isthmus.model.crossing import before_last, crossing, wanted
from isthmus.model.cut import Part
from isthmus.model.packing import Packing
from isthmus.recipe import LoraSection


class TrunkModule(Protocol):
    """The middle of the model as its ends see it. Real tokens only: no padding, mask or positions cross."""

    def __call__(
        self,
        h_TD: torch.Tensor,
        lengths: list[int],
        session: TrunkSession | None,
        rows: list[list[int]] | None = None,
    ) -> torch.Tensor:
        """Run the trunk's blocks.

        Args:
            h_TD: the sequences' tokens one after another.
            lengths: how many tokens each sequence has.
            session: the cache to continue; without one, each sequence starts at position 0.
            rows: new token ids of each sequence, if there are any; the last of them are behind ``h_TD``. They stay in
                the silo, whose boundary wants to know whom a tensor is about.

        Returns:
            ``[T, D]``; differentiable when gradients are enabled and there is no session.
        """
        ...

    def open_session(self) -> TrunkSession: ...


@runtime_checkable
class ReleasingTrunk(TrunkModule, Protocol):
    """A trunk that may know sequences from before."""

    @property
    def releases_once(self) -> bool:
        """Whether it takes rows of tokens (``from_rows``) and runs bottom itself, for those it has not released yet."""
        ...

    def from_rows(self, rows: list[list[int]], lengths: list[int]) -> torch.Tensor:
        """As ``__call__`` without a session, for the last ``lengths`` tokens of these sequences; bottom gets no
        gradient."""
        ...


class Shield(Protocol):
    """Runs bottom so that some tokens spread less into what leaves."""

    def hidden(self, bottom: Part, session: TrunkSession | None = None, **inputs: Any) -> torch.Tensor:
        """As ``bottom.hidden(**inputs)``; ``session`` goes with the cache among the inputs."""
        ...


class Guard(Protocol):
    """Teaches bottom what may cross."""

    def __call__(
        self, h_BLD: torch.Tensor, packing: Packing, rows: list[list[int]], targets_T: torch.Tensor, share: float = 1.0
    ) -> torch.Tensor:
        """``h_BLD`` as it is, with a gradient of its own on top of the one it gets (see ``silo.defence.guard``)."""
        ...


@runtime_checkable
class Drafting(Protocol):
    """An assistant model with a candidate generator of its own."""

    def candidates(self, cache: SplitCache, processors: Any, generation_config: Any) -> Any:
        """A ``CandidateGenerator`` of transformers for one generation with this cache."""
        ...


class SplitForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose middle blocks are elsewhere.

    ``forward``, ``generate`` (greedy, sampling, beams, assisted), ``Trainer`` and ``pipeline`` work as on the
    uncut model. Positions follow from the attention mask; 4-D masks and custom ``position_ids`` do not cross.

    Args:
        tail: how many of a prompt's last positions cross; None: all. Of the others, trunk and top know nothing but what
            bottom made of them.
        residual: top sees bottom's result where nothing crossed (and its trunk adds to it where something did).
    """

    config_class = PreTrainedConfig
    base_model_prefix = "split"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: PreTrainedConfig,
        bottom: Part,
        trunk: TrunkModule,
        top: Part,
        *,
        tail: int | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__(config)
        self.tail = tail
        self.residual = residual
        self.bottom = bottom
        self.top = top
        self.trunk = trunk
        self.shield: Shield | None = None
        """Runs bottom in its stead."""
        self.guard: Guard | None = None
        """Adds to bottom's gradient in training."""

    @property
    def ends(self) -> tuple[Part, Part]:
        return self.bottom, self.top

    def get_input_embeddings(self) -> nn.Module:
        return self.bottom.family.backbone_of(self.bottom.model).get_submodule(self.bottom.family.embedding)

    def new_cache(self) -> SplitCache:
        """An empty KV cache, with a session on the trunk that the first forward opens."""
        return SplitCache(self.bottom, self.trunk.open_session(), self.top)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SplitCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the uncut model's forward.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, past + L]``, 1 for real tokens; None: all are.
            use_cache: by default when there is neither a gradient nor a label to compute.
            logits_to_keep: as in transformers; ``labels`` must have as many positions.

        Raises:
            DataError: a mask that does not fit.
        """
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and labels is None and not torch.is_grad_enabled()
        cache = past_key_values if past_key_values is not None or not use_cache else self.new_cache()
        past = 0 if cache is None else cache.get_seq_length()
        shared = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        new = input_ids if inputs_embeds is None else inputs_embeds
        assert new is not None
        real_BL = _real(attention_mask, new)
        asked = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep else 1
        tail = None if past else self.tail
        crosses_BL = crossing(real_BL, tail, labels, kwargs.get("shift_labels"), asked=asked)
        targets_BL = wanted(real_BL, labels, kwargs.get("shift_labels")) if torch.is_grad_enabled() else None
        h_BLD = self._through_trunk(input_ids, inputs_embeds, cache, (real_BL, crosses_BL), targets_BL, shared)
        h_BLD, shared = self.for_top(h_BLD, crosses_BL, cache, logits_to_keep, shared)
        output = self.top.model(
            inputs_embeds=h_BLD,
            past_key_values=cache and cache.top,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **shared,
            **kwargs,
        )
        return CausalLMOutputWithPast(loss=output.loss, logits=output.logits, past_key_values=cache)

    def through_bottom(self, cache: SplitCache | None, **inputs: Any) -> torch.Tensor:
        """Bottom's result, ``[B, L, D]``; arguments as for its backbone, less the cache."""
        if cache is not None:
            inputs["past_key_values"] = cache.bottom
        if self.shield is None:
            return self.bottom.hidden(**inputs)
        return self.shield.hidden(self.bottom, None if cache is None else cache.session, **inputs)

    def for_top(
        self,
        g_BLD: torch.Tensor,
        crosses_BL: torch.Tensor,
        cache: SplitCache | None,
        logits_to_keep: int | torch.Tensor,
        shared: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """What top gets of the trunk's answers; where it knows only those to a tail, it attends to these, from place 0.

        Args:
            g_BLD: zero where nothing crossed.
            shared: arguments of top's forward; they come back, changed if need be.
        """
        if self.tail is None or self.residual:
            return g_BLD, shared
        start = 0
        if isinstance(logits_to_keep, int) and logits_to_keep:
            first = int(crosses_BL.any(dim=0).int().argmax())
            start = min(first, crosses_BL.shape[1] - logits_to_keep)
        crossed_BL = crosses_BL[:, start:]
        if cache is not None:
            crossed_BL = cache.cross(crossed_BL)
        g_BLD = g_BLD[:, start:]
        places_BL = (crossed_BL.cumsum(dim=1) - 1).clamp_min(0)[:, -g_BLD.shape[1] :]
        return g_BLD, {**shared, "attention_mask": crossed_BL.long(), "position_ids": places_BL}

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the adapters of the silo's own parts (the base model stays where it is)."""
        tensors = {name: tensor for part in self.ends for name, tensor in adapters.adapter_of(part).items()}
        if tensors:
            peft = self.top.model.peft_config["default"]
            lora = LoraSection(rank=peft.r, alpha=peft.lora_alpha, targets=tuple(peft.target_modules))
            adapters.export(Path(save_directory), tensors, lora, self.config._name_or_path)

    def _through_trunk(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        cache: SplitCache | None,
        places: tuple[torch.Tensor, torch.Tensor],
        targets_BL: torch.Tensor | None,
        shared: dict[str, Any],
    ) -> torch.Tensor:
        """Bottom and trunk, ``[B, L, D]``; where nothing crosses, zero or the residual.

        What left before, bottom does not even run.

        Args:
            places: which positions are real, and which of them cross.
            targets_BL: of a step that trains: what each should predict.
        """
        real_BL, crosses_BL = places
        packing = Packing(crosses_BL)
        if 0 in packing.lengths:
            raise DataError("a row of padding only", remedy="drop rows without a token")
        rows = None if input_ids is None else Packing(before_last(real_BL, crosses_BL)).rows(input_ids)
        if cache is None and rows is not None and not self.residual and _releases_once(self.trunk):
            return packing.unpack(self.trunk.from_rows(rows, packing.lengths))
        h_BLD = self.through_bottom(cache, input_ids=input_ids, inputs_embeds=inputs_embeds, **shared)
        if self.guard is not None and rows is not None and targets_BL is not None:
            h_BLD = self.guard(h_BLD, packing, rows, targets_BL[crosses_BL])
        session = None if cache is None else cache.session
        g_TD = self.trunk(packing.pack(h_BLD), packing.lengths, session, rows)
        g_BLD = packing.unpack(g_TD, h_BLD if self.residual else None)
        if cache is not None and cache.transcript is not None:
            cache.transcript.add(h_BLD, g_BLD, packing.real_BL)
        return g_BLD

    def _get_candidate_generator(self, **settings: Any) -> Any:
        assistant = settings.get("assistant_model")
        if isinstance(assistant, Drafting):
            cache = settings["model_kwargs"]["past_key_values"]
            return assistant.candidates(cache, settings["logits_processor"], settings["generation_config"])
        return super()._get_candidate_generator(**settings)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _releases_once(trunk: TrunkModule) -> TypeGuard[ReleasingTrunk]:
    return isinstance(trunk, ReleasingTrunk) and trunk.releases_once


def _real(attention_mask: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    batch, length = new.shape[:2]
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=new.device)
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise DataError(
            f"an attention mask of shape {tuple(attention_mask.shape)} for {batch} rows of {length} new tokens",
            remedy="give a 2-D mask over all positions so far, 1 for real tokens",
        )
    return attention_mask[:, -length:].bool()
