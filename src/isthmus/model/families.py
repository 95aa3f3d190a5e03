"""The model families that can be cut, with the attribute names of each. A new family is one row of ``FAMILIES``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from isthmus.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Attribute names in transformers' causal language model of one family."""

    backbone: str = "model"
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"

    def block_prefix(self) -> str:
        """The prefix of a block's tensor names, up to the block's index."""
        return f"{self.backbone}.{self.blocks}."

    def backbone_of(self, model: nn.Module) -> nn.Module:
        """The model without its head."""
        return model.get_submodule(self.backbone)

    def embedding_of(self, model: nn.Module) -> nn.Module:
        """The token embedding."""
        return self.backbone_of(model).get_submodule(self.embedding)


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(),
    "olmo2": Family(),
    "gemma2": Family(),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a configuration, by its ``model_type``.

    Raises:
        ModelError: the family is not supported.
    """
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"models of type {config.model_type!r} are not supported", remedy=f"use a model of one of the types {known}"
        ) from None
