"""The split model: an ordinary transformers causal LM with bottom and top in the silo and the trunk behind a module.

A forward has three steps: ``model.outbound`` decides everything that crosses, the trunk answers, ``model.inbound``
computes logits from the answer. ``silo.pipeline`` calls them separately, to compute while the trunk does.

Shapes: B rows, L new positions, T positions that cross, D the model's width, W the width that crosses, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.generic import can_return_tuple

from isthmus.errors import DataError, ModelError, NotSupportedError
from isthmus.model import adapters
from isthmus.model.adapter_methods import AdapterMethods
from isthmus.model.arguments import (
    PACKED,
    Places,
    check_cache,
    check_counted,
    check_generation,
    check_labels,
    check_packed_arguments,
    check_skipped,
    check_tokens,
    find_places,
    take_arguments,
)
from isthmus.model.backbone import SplitBackbone
from isthmus.model.bottleneck import Bottleneck
from isthmus.model.cache import SplitCache, without_gradient
from isthmus.model.candidates import BoundedCandidates, CandidatesByLength
from isthmus.model.crossing import (
    FreshExample,
    Outbound,
    Reply,
    count_supervised,
    crossing_positions,
    prediction_targets,
    up_to_last_crossing,
)
from isthmus.model.cut import Part
from isthmus.model.interfaces import BottomGuard, BottomShield, Drafting, ModelBoundary, Rows, TrunkModule
from isthmus.model.loss import loss_and_logits
from isthmus.model.packing import Packing
from isthmus.model.recompute import hidden_recomputed
from isthmus.model.refusals import CLASS_REFUSALS, DTYPE, REFUSALS, refuse, refusing
from isthmus.model.rope import by_length, context_length, given_lengths, recomputed_after
from isthmus.privacy.subjects import Subjects


@refusing(REFUSALS, CLASS_REFUSALS)
class SplitForCausalLM(AdapterMethods, PreTrainedModel, GenerationMixin):
    """A causal language model whose middle blocks run in the trunk.

    ``forward``, ``generate`` (greedy, sampling, beams, assisted), ``Trainer`` and ``pipeline`` work as on the
    uncut model. ``docs/features/transformers.md`` lists every argument and method, with what is refused by name.

    Args:
        boundary: the silo's exit for tensors; None: nothing leaves the silo (a draft), so records and clipping are
            skipped.
        tail: number of a prompt's last positions that cross; None: all. Trunk and top receive no hidden states of the
            other positions, only their effect through bottom's attention.
        residual: top's input is bottom's output, plus the trunk's answer at the positions that crossed.
        bottleneck: optional layers at the cut; None: there are none.
        shield: runs bottom with less attention to sensitive tokens; None: bottom runs as it is.
        guard: adds the gradient of the defence's loss in training; None: no defence.
        recompute: in training, bottom and top compute their activations again in the backward (``model.recompute``);
            top where ``skip_logits`` is set.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
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
        boundary: ModelBoundary | None = None,
        tail: int | None = None,
        residual: bool = False,
        bottleneck: Bottleneck | None = None,
        shield: BottomShield | None = None,
        guard: BottomGuard | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__(config)
        self.bottom = bottom
        self.trunk = trunk
        self.top = top
        self.tail = tail
        self.residual = residual
        self.boundary = boundary
        self.bottleneck = bottleneck
        self.shield = shield
        self.guard = guard
        self.recompute = recompute
        self._by_length = by_length(config)
        self.context = context_length(config)
        """Largest number of tokens of a sequence."""
        self.recomputed_after = None if tail is not None else recomputed_after(top.model)
        """The length after which a generation's caches are computed again from the first token; None: never."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Transformers asks the class of a mixture of experts; the parts have experts, each with its own setting."""
        return True

    @property
    def ends(self) -> tuple[Part, Part]:  # type: ignore[override]
        """Bottom and top."""
        return self.bottom, self.top

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, in bottom."""
        return self.bottom.family.embedding_of(self.bottom.model)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head, in top."""
        return self.top.head

    def get_decoder(self) -> SplitBackbone:
        """The model without its head."""
        return self.backbone

    @property
    def backbone(self) -> SplitBackbone:
        """The model without its head; ``base_model`` is the same."""
        return SplitBackbone(self)

    def new_cache(self) -> SplitCache:
        """An empty KV cache with a session on the trunk; the first forward opens the session there."""
        return SplitCache(self.bottom, self.trunk.open_session(), self.top)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @can_return_tuple  # type: ignore[untyped-decorator]
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
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if there are labels, like the uncut model's forward.

        ``docs/features/transformers.md`` lists every argument.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, past + L]``, 1 for real tokens; None: all are real.
            position_ids: ``[B, L]``; those that restart at 0 within a row make several sequences of it.
            use_cache: by default true without labels and with gradients disabled.
            logits_to_keep: as in transformers; ``labels`` must cover the same positions.
            skip_logits: compute the loss alone, in less memory (``model.loss``); the output's logits are None.

        Raises:
            DataError: ids, labels or mask have a wrong shape or dtype, or a row has no token; or there is no loss to
                compute without logits.
            NotSupportedError: an argument, a mask or positions that the split model does not compute with.
        """
        loss, packed = take_arguments(kwargs, self.config)
        new = check_tokens(input_ids, inputs_embeds, self.get_input_embeddings())
        check_labels(
            labels, loss.get("shift_labels"), new, logits_to_keep, self.top.config.get_text_config().vocab_size
        )
        check_skipped(skip_logits, labels)
        head = {"labels": labels, "logits_to_keep": logits_to_keep, "skip_logits": skip_logits, **loss}
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache, **packed}
        cache = self._cache(past_key_values, inputs, wanted=labels is None)
        outbound = self.outbound(input_ids, inputs, head, inputs_embeds=inputs_embeds, cache=cache)
        if torch.is_grad_enabled():
            outbound = replace(outbound, supervised=count_supervised(labels, kwargs.get("shift_labels")))
        return self.inbound(outbound, self.trunk(outbound), head)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def last_hidden(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SplitCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The hidden states that the head reads, ``[B, L, D]``, as ``base_model`` of the uncut model gives them.

        Args:
            input_ids, attention_mask, position_ids, use_cache: as in ``forward``.

        Raises:
            DataError: as in ``forward``.
            NotSupportedError: as in ``forward``; or not all positions have hidden states (``boundary.tail``), or a loss
                that is computed from them misses what the model adds to its own (``boundary.defence``, an adapter of
                the head).
        """
        self._check_headless()
        loss, packed = take_arguments(kwargs, self.config)
        if loss:
            raise NotSupportedError("base_model computes no loss", remedy=f"leave {', '.join(loss)} out")
        check_tokens(input_ids, inputs_embeds, self.get_input_embeddings())
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache, **packed}
        cache = self._cache(past_key_values, inputs, wanted=True)
        outbound = self.outbound(input_ids, inputs, {}, inputs_embeds=inputs_embeds, cache=cache)
        g_BLD, inputs = self._received(outbound, self.trunk(outbound), {})
        past = None if cache is None else cache.top
        h_BLD = self.top.hidden(inputs_embeds=g_BLD, past_key_values=past, **inputs)
        return BaseModelOutputWithPast(last_hidden_state=h_BLD, past_key_values=cache)

    def outbound(
        self,
        input_ids: torch.Tensor | None,
        inputs: dict[str, Any],
        head: dict[str, Any],
        *,
        inputs_embeds: torch.Tensor | None = None,
        cache: SplitCache | None = None,
        share: float = 1.0,
    ) -> Outbound:
        """Everything of a batch that crosses: its positions, their hidden states and the records they belong to.

        Args:
            input_ids: ``[B, L]``; None if ``inputs_embeds`` ``[B, L, D]`` are given.
            inputs: ``attention_mask``, ``position_ids`` and ``use_cache`` as in ``forward``, and ``arguments.PACKED``.
            head: ``labels``, ``shift_labels`` and ``logits_to_keep`` as in ``forward``.
            share: the batch's share of the step's weight; the factor of the guard's gradient.

        Raises:
            DataError: the mask's shape does not fit, or a row has no token.
            NotSupportedError: mask or positions break the rule of ``model.arguments``.
            ModelError: bottom trains, but each example is released once.
        """
        new = input_ids if inputs_embeds is None else inputs_embeds
        assert new is not None
        places, packing, read = self._places(new, inputs, head, cache)
        rows = None if input_ids is None else read.rows(input_ids)
        inputs = {**places.inputs(), "use_cache": cache is not None}
        if cache is None and self.boundary is not None and self.boundary.released is not None:
            if rows is None:
                raise NotSupportedError(
                    "boundary.release_once knows an example by its ids, and got embeddings", remedy="pass input_ids"
                )
            return self._released_once(rows, packing, input_ids, inputs)
        h_BLD = self._through_bottom(cache, input_ids=input_ids, inputs_embeds=inputs_embeds, **inputs)
        subjects = None
        if cache is not None:
            cache.real_BP = places.real_BP
            subjects = cache.session.subjects(rows, packing.lengths)
        elif self.boundary is not None:
            subjects = self.boundary.records.subjects(rows, packing.lengths)
        if self.guard is not None and torch.is_grad_enabled():
            targets_BL = prediction_targets(packing.real_BL, head.get("labels"), head.get("shift_labels"))
            if targets_BL is None or rows is None:
                raise NotSupportedError(
                    "boundary.defence trains with input_ids and labels, and got none",
                    remedy="pass both, or compute under torch.no_grad()",
                )
            assert subjects is not None
            h_BLD = self.guard(h_BLD, packing, rows, targets_BL[packing.real_BL], subjects, share)
        h_TW = self._narrowed(packing.pack(h_BLD), subjects)
        return Outbound(packing.lengths, h_TW, subjects, cache=cache, packing=packing, h_BLD=h_BLD, inputs=inputs)

    def inbound(self, outbound: Outbound, reply: Reply, head: dict[str, Any]) -> CausalLMOutputWithPast:
        """Logits, and the loss if there are labels, from the trunk's answer.

        Args:
            outbound: the batch, from ``model.outbound``.
            reply: the trunk's answer to it.
            head: as in ``outbound``, with ``skip_logits`` and any other arguments of top's forward.
        """
        g_BLD, inputs = self._received(outbound, reply, head)
        past = None if outbound.cache is None else outbound.cache.top
        inputs = {"inputs_embeds": g_BLD, "past_key_values": past, **inputs}
        loss, logits = loss_and_logits(self.top, inputs, head, recompute=self.recompute)
        if outbound.cache is not None:
            outbound.cache.drafted = False
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outbound.cache)

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **_: Any) -> None:
        """Write what was trained in bottom and top, and the number of the trunk's round that belongs to it.

        The folder is a PEFT adapter of bottom and top (``isthmus export`` writes one of the whole model) beside
        ``model.safetensors``, from which ``load_state_dict``, and so the Hugging Face ``Trainer``, brings back all
        three parts. The base model is not copied.

        Raises:
            NotSupportedError: it should go to the Hub.
            ProtocolError: the trunk cannot save its state now.
        """
        if push_to_hub:
            refuse("save_pretrained(push_to_hub=True)", REFUSALS["push_to_hub"])
        folder = Path(save_directory)
        tensors = {name: tensor for part in self.ends for name, tensor in adapters.adapter_of(part).items()}
        lora = adapters.lora_of(self.ends)
        if lora is not None:
            adapters.write_adapter(folder, tensors, lora, self.config._name_or_path, whole=False)
        trained = {name: one.detach().contiguous() for name, one in self._trained().items()}
        assert isinstance(self.trunk, nn.Module)
        trained |= self.trunk.state_dict(prefix="trunk.")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def enable_input_require_grads(self) -> None:
        """With reentrant checkpointing, layers have gradients only if their input has: needed where bottom trains."""
        if any(parameter.requires_grad for parameter in self.bottom.parameters()):
            super().enable_input_require_grads()

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """The names of a state dict that ``save_pretrained`` does not write; ``Trainer`` does not miss them."""
        written = {*self._trained(), *dict(self.trunk.named_parameters(prefix="trunk"))}  # type: ignore[attr-defined]
        return [name for name, _ in self.named_parameters(remove_duplicate=False) if name not in written]

    def _trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the recipe added to bottom and top, by their name in a state dict."""
        added = {id(one) for part in self.ends for one in adapters.adapter_parameters(part).values()}
        return {name: one for name, one in self.named_parameters() if id(one) in added}

    def _cache(self, given: Any, inputs: dict[str, Any], *, wanted: bool) -> SplitCache | None:
        """The cache that a forward fills: the caller's, a new one, or None.

        Args:
            inputs: as in ``outbound``; its ``use_cache`` becomes what the uncut model would take.
            wanted: whether a caller that does not say so may want one. A session on the trunk costs memory there, so
                there is none for a loss or with gradients.
        """
        cache, asked = check_cache(given, self.bottom), inputs["use_cache"]
        inputs["use_cache"] = (
            bool(getattr(self.config, "use_cache", True) if asked is None else asked) or cache is not None
        )
        if cache is None and inputs["use_cache"] and (asked or (wanted and not torch.is_grad_enabled())):
            return self.new_cache()
        return cache

    def _places(
        self, new: torch.Tensor, inputs: dict[str, Any], head: dict[str, Any], cache: SplitCache | None
    ) -> tuple[Places, Packing, Packing]:
        """Where the new tokens are; the packing of those that cross; and that of each row's up to the last of them.

        Arguments are those of ``outbound``.
        """
        places = find_places(
            new,
            inputs.get("attention_mask"),
            inputs.get("position_ids"),
            past_BP=None if cache is None else cache.real_BP,
            cached=bool(inputs.get("use_cache")) or cache is not None,
            keeps_apart=self.bottom.family.keeps_apart,
        )
        if self.bottom.family.counts_past and self.bottom.config.attn_temperature_tuning:
            check_counted(places, self.bottom.config.floor_scale)
        crosses_BL = real_BL = places.real_of(new.shape[1])
        if places.starts_BL is not None:
            self._check_packed()
        labels, keep = head.get("labels"), head.get("logits_to_keep", 0)
        if self.tail is not None and not (cache is not None and cache.get_seq_length()):
            targets = head.get("shift_labels")
            scored = keep if isinstance(keep, int) and keep else 1
            crosses_BL = crossing_positions(real_BL, self.tail, labels, targets, scored=scored)
            if (labels is None and targets is None) or isinstance(keep, torch.Tensor):
                self._check_scored(real_BL, crosses_BL, keep)
        packing = Packing(crosses_BL, places.starts_BL)
        if 0 in packing.lengths:
            raise DataError("a row holds only padding", remedy="remove rows without a token")
        check_packed_arguments({name: inputs[name] for name in PACKED if name in inputs}, packing)
        if crosses_BL is real_BL:
            return places, packing, packing
        return places, packing, Packing(up_to_last_crossing(real_BL, crosses_BL))

    def _check_packed(self) -> None:
        """Refuse several sequences in a row with options that are defined for one."""
        options = {"boundary.tail": self.tail is not None, "sensitivity.attention": self.shield is not None}
        for option in (name for name, on in options.items() if on):
            raise NotSupportedError(
                f"position_ids restart within a row, and {option} is defined for one sequence a row",
                remedy="give each sequence a row of its own: no packing, no padding_free",
            )

    def _check_scored(self, real_BL: torch.Tensor, crosses_BL: torch.Tensor, keep: int | torch.Tensor) -> None:
        """Refuse logits of a prompt's positions that do not cross.

        Args:
            keep: number of last positions that logits are computed of; 0: all.
        """
        missing_BL = real_BL & ~crosses_BL
        if isinstance(keep, torch.Tensor) or (not self.residual and bool(missing_BL[:, -keep:].any())):
            raise NotSupportedError(
                f"only the last {self.tail} positions of a prompt cross (boundary.tail), and logits of more are due",
                remedy="pass labels, or the number of last positions as logits_to_keep (generate: 1)",
            )

    def _check_headless(self) -> None:
        """Refuse hidden states without the head where a caller's own loss would not be the model's."""
        remedy = "call the model itself, with labels"
        if self.tail is not None and not self.residual:
            raise NotSupportedError(
                "base_model has no hidden states of the positions that do not cross (boundary.tail)", remedy=remedy
            )
        if self.guard is not None and torch.is_grad_enabled():
            raise NotSupportedError("base_model does not train boundary.defence, which needs labels", remedy=remedy)
        if torch.is_grad_enabled() and isinstance(self.get_output_embeddings(), BaseTunerLayer):
            raise NotSupportedError("a loss computed from base_model leaves out the head's adapter", remedy=remedy)

    def _received(self, outbound: Outbound, reply: Reply, head: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Top's input, ``[B, L, D]``, and its mask and position ids; arguments as in ``inbound``."""
        packing, cache, h_BLD = outbound.packing, outbound.cache, outbound.h_BLD
        assert packing is not None
        g_TD = reply.g_TD
        if cache is not None and torch.is_grad_enabled() and any(one.requires_grad for one in self.parameters()):
            g_TD = without_gradient(g_TD)
        if self.bottleneck is not None:
            h_TD = None if h_BLD is None else packing.pack(h_BLD)
            g_TD = self.bottleneck.join(h_TD, g_TD, reply.noise_TW)
        g_BLD = packing.unpack(g_TD, h_BLD if self.residual else None)
        if cache is not None and cache.transcript is not None:
            assert h_BLD is not None
            cache.transcript.add(h_BLD, g_BLD, packing.real_BL)
        inputs = outbound.inputs
        if self.tail is not None and not self.residual:
            g_BLD, inputs = self._tail_alone(g_BLD, packing.real_BL, cache, head.get("logits_to_keep", 0), inputs)
        return g_BLD, inputs

    def _through_bottom(self, cache: SplitCache | None, **inputs: Any) -> torch.Tensor:
        """Bottom's output, ``[B, L, D]``; arguments as for its backbone without the cache."""
        if cache is not None:
            inputs["past_key_values"] = cache.bottom
        if self.recompute and cache is None and self.shield is None and torch.is_grad_enabled():
            return hidden_recomputed(self.bottom, inputs)
        if self.shield is None:
            return self.bottom.hidden(**inputs)
        return self.shield.hidden(self.bottom, None if cache is None else cache.session, **inputs)

    def _narrowed(self, h_TD: torch.Tensor, subjects: Subjects | None) -> torch.Tensor:
        """Bottom's output projected to the width that crosses, ``[T, W]``.

        With a gradient it is clipped here, so that clipping is differentiated. The boundary clips every release again.
        """
        h_TW = h_TD if self.bottleneck is None else self.bottleneck.narrow(h_TD)
        if self.boundary is not None and self.boundary.clips and h_TW.requires_grad and torch.is_grad_enabled():
            assert subjects is not None
            return self.boundary.clipped(h_TW, "forward", subjects)
        return h_TW

    def _released_once(
        self, rows: Rows, packing: Packing, input_ids: torch.Tensor | None, inputs: dict[str, Any]
    ) -> Outbound:
        """A batch sent as identifiers. Bottom runs on examples not released before, with a residual path on all."""
        assert self.boundary is not None
        released = self.boundary.released
        assert released is not None
        if any(parameter.requires_grad for parameter in self.bottom.parameters()):
            raise ModelError(
                "bottom trains, but boundary.release_once releases its hidden states only once",
                remedy="set lora.freeze_bottom = true or boundary.release_once = false",
            )
        lengths, subjects = packing.lengths, self.boundary.records.subjects(rows, packing.lengths)
        numbers = [released.number(row, length) for row, length in zip(rows, lengths, strict=True)]
        new = {number: index for index, number in enumerate(numbers) if number not in released}
        fresh = self._fresh(new, rows, lengths, subjects)
        h_BLD = h_TW = None
        if self.residual:
            h_BLD = self._through_bottom(None, input_ids=input_ids, **inputs)
            h_TW = self._narrowed(packing.pack(h_BLD), subjects)
        like = next(self.bottom.parameters())
        return Outbound(lengths, h_TW, subjects, numbers, fresh, packing=packing, h_BLD=h_BLD, like=like, inputs=inputs)

    @torch.no_grad()
    def _fresh(self, new: dict[int, int], rows: Rows, lengths: list[int], subjects: Subjects) -> list[FreshExample]:
        """The hidden states of examples not released before.

        A row's result must not depend on other rows: with padding on the right, causal attention needs no mask.

        Args:
            new: index of each example's row, by identifier.
        """
        if not new:
            return []
        device, chosen = next(self.bottom.parameters()).device, [rows[index] for index in new.values()]
        packing = Packing.of_lengths(list(map(len, chosen)), device, pad_left=False)
        ids_BL = torch.zeros(packing.real_BL.shape, dtype=torch.long, device=device)
        ids_BL[packing.real_BL] = torch.tensor([token for row in chosen for token in row], device=device)
        inputs: dict[str, Any] = {"input_ids": ids_BL, "use_cache": False}
        if self.shield is not None:
            inputs["attention_mask"] = packing.real_BL.long()
        self.bottom.eval()
        with given_lengths([len(row) for row in chosen]):
            h_BLD = self._through_bottom(None, **inputs)
        h_BLW = h_BLD if self.bottleneck is None else self.bottleneck.narrow(h_BLD)
        return [
            FreshExample(number, h_LW[len(rows[index]) - lengths[index] : len(rows[index])], subjects.of(index))
            for (number, index), h_LW in zip(new.items(), h_BLW, strict=True)
        ]

    def _tail_alone(
        self,
        g_BLD: torch.Tensor,
        crosses_BL: torch.Tensor,
        cache: SplitCache | None,
        logits_to_keep: int | torch.Tensor,
        inputs: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Top's input if only a prompt's tail crossed: top attends to those positions alone, numbered from 0.

        Args:
            g_BLD: the trunk's answer; zero where nothing crossed.
            inputs: arguments of top's forward.

        Returns:
            The answer at the kept positions, and ``inputs`` with mask and position ids that fit it.
        """
        start = 0
        if isinstance(logits_to_keep, int) and logits_to_keep:
            first = int(crosses_BL.any(dim=0).int().argmax())
            start = min(first, crosses_BL.shape[1] - logits_to_keep)
        crossed_BL = crosses_BL[:, start:]
        if cache is not None:
            crossed_BL = cache.add_crossed(crossed_BL)
        g_BLD = g_BLD[:, start:]
        positions_BL = (crossed_BL.cumsum(dim=1) - 1).clamp_min(0)[:, -g_BLD.shape[1] :]
        return g_BLD, {**inputs, "attention_mask": crossed_BL.long(), "position_ids": positions_BL}

    def _get_name(self) -> str:
        """The name of the family's causal language model: by it, ``Trainer`` knows that its smoothed labels shift."""
        return self.top.model._get_name()  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves the silo's parts to a device (``to``, ``cuda``, ``cpu``).

        Raises:
            NotSupportedError: it would change a dtype (``half``, ``to(dtype)``).
        """
        for tensor in (*self.parameters(), *self.buffers()):
            if fn(tensor.new_empty(0)).dtype is not tensor.dtype:
                refuse(f"a change of {tensor.dtype}", DTYPE)
        super()._apply(fn, recurse)
        return self

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        check_generation(prepared)
        return prepared, model_kwargs

    def _get_candidate_generator(self, **settings: Any) -> Any:
        assistant, known = settings.get("assistant_model"), settings["model_kwargs"]
        cache, mask_BP = known["past_key_values"], known.get("attention_mask")
        if isinstance(assistant, Drafting):
            made = assistant.candidates(cache, settings["logits_processor"], settings["generation_config"])
        else:
            made = super()._get_candidate_generator(**settings)
        padding = 0 if mask_BP is None else int((mask_BP == 0).sum())
        if not self._by_length:
            return BoundedCandidates(made, self.context, padding)
        if settings["generation_config"].assistant_ensemble_weight is not None:
            raise NotSupportedError(
                "with assistant_ensemble_weight drafts change the answer, and how many there may be depends on this"
                " model's rope",
                remedy="leave assistant_ensemble_weight out",
            )
        return CandidatesByLength(made, self.context, padding, cache, self.recomputed_after)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward, as in transformers.

        If a row crosses the length after which the model's family drops its cache, all of them are computed, and
        released, again from their first token.
        """
        if isinstance(past_key_values, SplitCache) and self._drops(past_key_values, input_ids, attention_mask):
            past_key_values.restart(self.trunk.open_session())
            next_sequence_length = None
        return super().prepare_inputs_for_generation(  # type: ignore[no-any-return]
            input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds, **kwargs
        )

    def _drops(self, cache: SplitCache, ids_BP: torch.Tensor, mask_BP: torch.Tensor | None) -> bool:
        """Whether a row's length crosses with its new tokens the one after which the family drops its cache."""
        switch, past = self.recomputed_after, cache.get_seq_length()
        mask_BP = torch.ones_like(ids_BP) if mask_BP is None else mask_BP
        if switch is None or not past or mask_BP.shape != ids_BP.shape:  # a chunk of a prompt has no text to go back to
            return False
        before_B, after_B = mask_BP[:, :past].sum(dim=1), mask_BP.sum(dim=1)
        return bool(((before_B <= switch) & (after_B > switch)).any())

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        generation_config.cache_implementation = None  # "dynamic", of which there is one form
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
