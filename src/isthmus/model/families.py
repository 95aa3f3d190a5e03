"""The model families that can be cut, with the attribute names of each. A new family is one row of ``FAMILIES``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from isthmus.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Attribute names in transformers' causal language model of one family."""

    backbone: str = "model"
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    input_scale: str = ""
    """The backbone's attribute that its forward multiplies embeddings by; empty: there is none."""
    uncut_backbone: str = ""
    """Where the uncut model keeps the backbone, if not at ``backbone``: the text part of a multimodal model."""
    unused: str = ""
    """A setting of the text part that the multimodal model does not follow; empty: there is none."""
    keeps_apart: bool = True
    """Whether the uncut model keeps sequences of one row apart by positions that restart (a packed batch)."""
    counts_past: bool = False
    """Whether attention counts a token's position from the cache's length instead of ``position_ids``."""

    def block_prefix(self) -> str:
        """The prefix of a block's tensor names in a part, up to the block's index."""
        return f"{self.backbone}.{self.blocks}."

    def uncut_prefix(self) -> str:
        """The prefix of the backbone's tensor names in the uncut model."""
        return f"{self.uncut_backbone or self.backbone}."

    def backbone_of(self, model: nn.Module) -> nn.Module:
        """The model without its head."""
        return model.get_submodule(self.backbone)

    def embedding_of(self, model: nn.Module) -> nn.Module:
        """The token embedding."""
        return self.backbone_of(model).get_submodule(self.embedding)


FAMILIES: dict[str, Family] = {
    "cohere2": Family(),
    "deepseek_v3": Family(),
    "exaone4": Family(),
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3": Family(uncut_backbone="model.language_model", unused="final_logit_softcapping"),
    "gemma3_text": Family(),
    "glm4": Family(),
    "gpt_oss": Family(keeps_apart=False),
    "granite": Family(input_scale="embedding_multiplier"),
    "llama": Family(),
    "llama4": Family(counts_past=True),
    "llama4_text": Family(counts_past=True),
    "ministral": Family(),
    "ministral3": Family(),
    "mistral": Family(),
    "mistral3": Family(uncut_backbone="model.language_model"),
    "mixtral": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "phi": Family(norm="final_layernorm"),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "smollm3": Family(),
    "starcoder2": Family(),
}

REFUSED = {
    "output_router_logits": "a balancing loss over the routers of all blocks",
    "use_bidirectional_attention": "attention to later tokens",
    "is_encoder_decoder": "an encoder",
    "add_cross_attention": "attention to an encoder",
}
"""Settings of config.json that a split model cannot follow if they are true, and what they ask for."""


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a configuration, by its ``model_type``.

    Raises:
        ModelError: the family, or a setting in its configuration, is not supported.
    """
    text = config.get_text_config()
    for kind in (config.model_type, text.model_type):
        if kind not in FAMILIES:
            known, why = ", ".join(sorted(FAMILIES)), ""
            if "linear_attention" in (getattr(text, "layer_types", None) or ()):
                why = ": their linear attention keeps a state that can neither be shared in a pass nor go back"
            raise ModelError(
                f"models of type {kind!r} are not supported{why}", remedy=f"use a model of one of the types {known}"
            )
    for setting, meaning in REFUSED.items():
        if getattr(text, setting, False):
            raise ModelError(
                f"config.json has {setting} = true, which asks for {meaning}: a split model has none",
                remedy=f"set {setting} to false in config.json, or use another model",
            )
    return FAMILIES[config.model_type]


def uncut_class(config: PreTrainedConfig) -> Any:
    """Transformers' class of the uncut model: a causal language model, or where there is none one for images and
    text."""
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def uncut_shapes(config: PreTrainedConfig) -> PreTrainedModel:
    """The uncut model on the ``meta`` device: all modules and shapes, no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = uncut_class(config).from_config(config)
    return model
